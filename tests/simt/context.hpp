// Where a fiber stopped, and the change from one to another. No system calls on x86-64.
#pragma once

#include <stddef.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {
namespace {

constexpr size_t STACK_BYTES = 128 << 10;

#if defined(__x86_64__)
struct Context {
    void* stack_pointer;
};
extern "C" void simt_switch(void** from, void* to);
asm(R"(
    .text
    .globl simt_switch
    .hidden simt_switch
    .type simt_switch, @function
simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size simt_switch, .-simt_switch
)");
void change(Context& from, Context& to) { simt_switch(&from.stack_pointer, to.stack_pointer); }
void begin(Context& context, char* stack, void (*entry)()) {
    void** const top = reinterpret_cast<void**>(stack + STACK_BYTES);
    top[-1] = nullptr;
    top[-2] = reinterpret_cast<void*>(entry);
    for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
    context.stack_pointer = top - 8;
}
#else
using Context = ucontext_t;
void change(Context& from, Context& to) { swapcontext(&from, &to); }
void begin(Context& context, char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = STACK_BYTES;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}
#endif

}  // namespace
}  // namespace simt
