// A driver to meet without a GPU: libcuda's entry points that kvwire calls, strict about them.
// Kernels run on tests/simt's fibers, streams on a thread each, later than they were told to.
#include "world.hpp"

extern "C" const char* simt_launch(const char* name, unsigned grid_x, unsigned grid_y,
                                   unsigned threads, void** parameters, uint64_t seed);
extern "C" int simt_parameters(const char* name);
extern "C" size_t simt_parameter_bytes(const char* name, int number);

#define API extern "C" __attribute__((visibility("default"))) CUresult

namespace {

bool is_lost(const Entry& entry) {
    return entry.device >= 0 && world.devices[entry.device].lost != SUCCESS;
}

// Of a lost context nothing is left to be given back; that it was given back is counted all the
// same. `give` does so and returns what the call answers otherwise.
template <class Give>
CUresult give_back(Entry& entry, Give give) {
    const CUresult lost = entry.device < 0 ? SUCCESS : world.devices[entry.device].lost;
    if (entry.result && !lost) return entry.result;
    entry.result = SUCCESS;
    const CUresult result = give();
    return lost ? lost : result;
}

// A copy that is run later, if what it touches is still there then.
void enqueue_copy(Stream& stream, const char* name, void* to, const void* from, size_t bytes,
                  bool to_device, bool from_device) {
    const int device = stream.device;
    enqueue(stream, [=](bool lost) {
        if (lost || bytes == 0) return SUCCESS;
        {
            const std::lock_guard<std::mutex> lock(world.lock);
            if (world.devices[device].lost) return SUCCESS;
            if ((to_device && !on_device(number(to), bytes)) ||
                (from_device && !on_device(number(from), bytes))) {
                note(std::string(name) + ": its memory was freed before it ran");
                return ILLEGAL_ADDRESS;
            }
        }
        memmove(to, from, bytes);
        return SUCCESS;
    }, {number(to), number(from)});
}

// Copies between host and device, in order with a stream. What is not page-locked is the caller's
// again, or has arrived, when this returns.
CUresult copy_ordered(Entry& entry, CUstream handle, void* to, const void* from, size_t bytes,
                      bool to_device, bool waits) {
    const void* const host = to_device ? from : to;
    if (!entry.has_device(number(to_device ? to : from), bytes) || !entry.has_host(host, bytes))
        return entry.result;
    const auto stream = entry.stream(handle);
    if (!stream) return entry.result;
    enqueue_copy(*stream, entry.name, to, from, bytes, to_device, !to_device);
    if (waits || !is_pinned(host, bytes)) {
        drain(entry.lock, *stream);
        return world.devices[entry.device].lost;
    }
    return SUCCESS;
}

}  // namespace

// ---- devices and contexts

API cuInit(unsigned flags) {
    const std::lock_guard<std::mutex> lock(world.lock);
    if (flags != 0) return INVALID_VALUE;
    if (!world.initialised)
        pthread_key_create(&world.contexts,
                           [](void* held) { delete static_cast<std::vector<int>*>(held); });
    world.initialised = true;
    return SUCCESS;
}

API cuDeviceGet(CUdevice* device, int ordinal) {
    ENTER("cuDeviceGet", false);
    if (!device) return entry.refuse(INVALID_VALUE, "null");
    if (ordinal < 0 || ordinal >= DEVICES) return INVALID_DEVICE;
    *device = ordinal;
    return SUCCESS;
}

API cuDeviceGetAttribute(int* value, int attribute, CUdevice device) {
    ENTER("cuDeviceGetAttribute", false);
    if (!value || attribute != 16) return entry.refuse(INVALID_VALUE, "attribute not modelled");
    if (device < 0 || device >= DEVICES) return INVALID_DEVICE;
    *value = 16;
    return SUCCESS;
}

API cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    ENTER("cuDevicePrimaryCtxRetain", false);
    if (!context) return entry.refuse(INVALID_VALUE, "null");
    if (device < 0 || device >= DEVICES) return INVALID_DEVICE;
    ++world.devices[device].retained;
    *context = context_of(device);
    return world.devices[device].lost;
}

API cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    ENTER("cuDevicePrimaryCtxRelease_v2", false);
    if (device < 0 || device >= DEVICES) return INVALID_DEVICE;
    if (world.devices[device].retained == 0)
        return entry.refuse(INVALID_CONTEXT, "released more often than retained");
    --world.devices[device].retained;
    return SUCCESS;
}

API cuCtxGetDevice(CUdevice* device) {
    Entry entry("cuCtxGetDevice", false);
    if (entry.result) return entry.result;
    if (!device) return entry.refuse(INVALID_VALUE, "null");
    if (entry.device < 0) return INVALID_CONTEXT;
    *device = entry.device;
    return SUCCESS;
}

API cuCtxSetCurrent(CUcontext context) {
    ENTER("cuCtxSetCurrent", false);
    std::vector<int>& stack = stack_of_thread();
    if (!stack.empty()) stack.pop_back();
    if (!context) return SUCCESS;
    if (device_of(context) < 0) return entry.refuse(INVALID_CONTEXT, "no such context");
    stack.push_back(device_of(context));
    return SUCCESS;
}

API cuCtxPushCurrent_v2(CUcontext context) {
    ENTER("cuCtxPushCurrent_v2", false);
    if (device_of(context) < 0) return entry.refuse(INVALID_CONTEXT, "no such context");
    stack_of_thread().push_back(device_of(context));
    return SUCCESS;
}

API cuCtxPopCurrent_v2(CUcontext* context) {
    Entry entry("cuCtxPopCurrent_v2", false);
    if (!world.initialised) return NOT_INITIALISED;
    std::vector<int>& stack = stack_of_thread();
    if (stack.empty()) return entry.refuse(INVALID_CONTEXT, "nothing to pop");
    if (context) *context = context_of(stack.back());
    stack.pop_back();
    return SUCCESS;
}

API cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    ENTER("cuCtxGetStreamPriorityRange");
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return SUCCESS;
}

// ---- kernels

API cuModuleLoadData(CUmodule* module, const void* image) {
    ENTER("cuModuleLoadData");
    if (!module || !image) return entry.refuse(INVALID_VALUE, "null");
    const uint64_t handle = new_handle();
    world.modules[handle] = entry.device;
    *module = handle_of<CUmodule>(handle);
    return SUCCESS;
}

API cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    ENTER("cuModuleGetFunction");
    if (!function || !name) return entry.refuse(INVALID_VALUE, "null");
    const auto found = world.modules.find(number(module));
    if (found == world.modules.end()) return entry.refuse(INVALID_HANDLE, "no such module");
    if (simt_parameters(name) < 0) return entry.refuse(NOT_FOUND, name);
    const uint64_t handle = new_handle();
    world.functions[handle] = {name, found->second};
    *function = handle_of<CUfunction>(handle);
    return SUCCESS;
}

API cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                   CUstream handle, void** parameters, void** extra) {
    ENTER("cuLaunchKernel");
    const auto found = world.functions.find(number(function));
    if (found == world.functions.end()) return entry.refuse(INVALID_HANDLE, "no such kernel");
    const Function& kernel = found->second;
    if (kernel.device != entry.device)
        return entry.refuse(INVALID_HANDLE, "a kernel of another context");
    if (grid_x == 0 || grid_y == 0 || grid_z == 0 || grid_x > INT32_MAX || grid_y > 65535 ||
        grid_z > 65535)
        return entry.refuse(INVALID_VALUE, "no such grid");
    if (uint64_t(block_x) * block_y * block_z == 0 || block_x > 1024 || block_y > 1024 ||
        uint64_t(block_x) * block_y * block_z > 1024)
        return entry.refuse(INVALID_VALUE, "no such block");
    if (grid_z != 1 || block_y != 1 || block_z != 1 || shared_bytes != 0)
        return entry.refuse(NOT_SUPPORTED, "not modelled");
    const int count = simt_parameters(kernel.name.c_str());
    if (extra || (count > 0 && !parameters)) return entry.refuse(INVALID_VALUE, "parameters");
    std::vector<uint64_t> values(size_t(count), 0);
    for (int i = 0; i < count; ++i) {
        if (!parameters[i]) return entry.refuse(INVALID_VALUE, "a null parameter");
        memcpy(&values[size_t(i)], parameters[i], simt_parameter_bytes(kernel.name.c_str(), i));
    }
    const auto stream = entry.stream(handle);
    if (!stream) return entry.result;
    const std::string name = kernel.name;
    const uint64_t seed = new_handle() / 16 % 4;
    const int device = entry.device;
    enqueue(*stream, [=](bool lost) mutable -> CUresult {
        if (lost) return SUCCESS;
        std::vector<void*> pointers;
        std::string fault;
        {
            const std::lock_guard<std::mutex> lock(world.lock);
            if (world.devices[device].lost) return SUCCESS;
            for (uint64_t& value : values) {
                if (find(world.freed, value, 1) != world.freed.end())
                    fault = name + ": an argument was freed before it ran";
                pointers.push_back(&value);
            }
        }
        if (fault.empty())
            if (const char* found =
                    simt_launch(name.c_str(), grid_x, grid_y, block_x, pointers.data(), seed))
                fault = name + ": " + found;
        const std::lock_guard<std::mutex> lock(world.lock);
        if (fault.empty() || world.devices[device].lost) return SUCCESS;
        note(fault);
        return LAUNCH_FAILED;
    }, values);
    return SUCCESS;
}

// ---- memory

API cuMemAlloc_v2(CUdeviceptr* address, size_t bytes) {
    ENTER("cuMemAlloc_v2");
    if (!address || bytes == 0) return entry.refuse(INVALID_VALUE, "no bytes");
    *address = allocate(bytes, false);
    return *address ? SUCCESS : OUT_OF_MEMORY;
}

API cuMemFree_v2(CUdeviceptr address) {
    Entry entry("cuMemFree_v2");
    return give_back(entry, [&] { return release(entry.name, address, false, is_lost(entry)); });
}

API cuMemHostAlloc(void** room, size_t bytes, unsigned flags) {
    ENTER("cuMemHostAlloc");
    if (!room || bytes == 0 || flags > 7) return entry.refuse(INVALID_VALUE, "no bytes");
    *room = handle_of<void*>(allocate(bytes, true));
    return *room ? SUCCESS : OUT_OF_MEMORY;
}

API cuMemFreeHost(void* room) {
    Entry entry("cuMemFreeHost");
    return give_back(entry, [&] { return release(entry.name, number(room), true, is_lost(entry)); });
}

API cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
    ENTER("cuMemcpyHtoDAsync_v2");
    return copy_ordered(entry, stream, handle_of<void*>(to), from, bytes, true, false);
}

API cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
    ENTER("cuMemcpyDtoHAsync_v2");
    return copy_ordered(entry, stream, to, handle_of<void*>(from), bytes, false, false);
}

API cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream handle) {
    ENTER("cuMemcpyDtoDAsync_v2");
    if (!entry.has_device(to, bytes) || !entry.has_device(from, bytes)) return entry.result;
    const auto stream = entry.stream(handle);
    if (!stream) return entry.result;
    enqueue_copy(*stream, entry.name, handle_of<void*>(to), handle_of<void*>(from), bytes, true,
                 true);
    return SUCCESS;
}

API cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) {
    ENTER("cuMemcpyDtoH_v2");
    return copy_ordered(entry, nullptr, to, handle_of<void*>(from), bytes, false, true);
}

// From pageable memory it returns once that was staged; the device may get it later, in order with
// the default stream only.
API cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) {
    ENTER("cuMemcpyHtoD_v2");
    if (is_pinned(from, bytes))
        return copy_ordered(entry, nullptr, handle_of<void*>(to), from, bytes, true, true);
    if (!entry.has_device(to, bytes) || !entry.has_host(from, bytes)) return entry.result;
    const auto stream = entry.stream(nullptr);
    drain(entry.lock, *stream);
    if (world.devices[entry.device].lost) return world.devices[entry.device].lost;
    if (bytes == 0) return SUCCESS;
    auto staged = std::make_shared<std::vector<char>>(
        static_cast<const char*>(from), static_cast<const char*>(from) + bytes);
    const char* const name = entry.name;
    const int device = entry.device;
    enqueue(*stream, [=](bool) {
        usleep(2000);
        const std::lock_guard<std::mutex> lock(world.lock);
        if (world.devices[device].lost) return SUCCESS;
        if (!on_device(to, bytes)) {
            note(std::string(name) + ": its memory was freed before it ran");
            return ILLEGAL_ADDRESS;
        }
        memcpy(handle_of<void*>(to), staged->data(), bytes);
        return SUCCESS;
    }, {to});
    return SUCCESS;
}

// ---- streams and events

API cuStreamCreateWithPriority(CUstream* handle, unsigned flags, int priority) {
    ENTER("cuStreamCreateWithPriority");
    if (!handle || priority > 0 || priority < -5) return entry.refuse(INVALID_VALUE, "priority");
    if (flags != 1) return entry.refuse(NOT_SUPPORTED, "blocking streams are not modelled");
    const uint64_t given = new_handle();
    world.streams[given] = new_stream(entry.device);
    *handle = handle_of<CUstream>(given);
    return SUCCESS;
}

API cuStreamDestroy_v2(CUstream handle) {
    Entry entry("cuStreamDestroy_v2");
    return give_back(entry, [&] {
        const auto stream = handle ? entry.stream(handle) : nullptr;
        if (!stream) return entry.refuse(INVALID_HANDLE, "no such stream");
        stream->closing = true;
        ++world.closing;
        world.streams.erase(number(handle));
        world.changed.notify_all();
        return int(SUCCESS);
    });
}

API cuStreamSynchronize(CUstream handle) {
    ENTER("cuStreamSynchronize");
    const auto stream = entry.stream(handle);
    if (!stream) return entry.result;
    drain(entry.lock, *stream);
    return world.devices[entry.device].lost;
}

API cuStreamWaitEvent(CUstream handle, CUevent waited, unsigned flags) {
    ENTER("cuStreamWaitEvent");
    if (flags != 0) return entry.refuse(INVALID_VALUE, "flags");
    const auto event = entry.event(waited);
    const auto stream = event ? entry.stream(handle) : nullptr;
    if (!stream) return entry.result;
    const uint64_t recorded = event->recorded;
    enqueue(*stream, [=](bool) {
        std::unique_lock<std::mutex> lock(world.lock);
        world.changed.wait(lock, [&] { return event->reached >= recorded; });
        return SUCCESS;
    });
    return SUCCESS;
}

API cuEventCreate(CUevent* handle, unsigned flags) {
    ENTER("cuEventCreate");
    if (!handle || flags > 3) return entry.refuse(INVALID_VALUE, "flags");
    const uint64_t given = new_handle();
    world.events[given] = std::make_shared<Event>(Event{entry.device, flags});
    *handle = handle_of<CUevent>(given);
    return SUCCESS;
}

API cuEventRecord(CUevent handle, CUstream on) {
    ENTER("cuEventRecord");
    const auto event = entry.event(handle);
    const auto stream = event ? entry.stream(on) : nullptr;
    if (!stream) return entry.result;
    if (event->device != stream->device)
        return entry.refuse(INVALID_HANDLE, "event and stream are of different contexts");
    const uint64_t recorded = ++event->recorded;
    enqueue(*stream, [=](bool) {
        const std::lock_guard<std::mutex> lock(world.lock);
        event->reached = std::max(event->reached, recorded);
        event->reached_s = now_s();
        return SUCCESS;
    });
    return SUCCESS;
}

API cuEventQuery(CUevent handle) {
    ENTER("cuEventQuery");
    const auto event = entry.event(handle);
    if (!event) return entry.result;
    return event->reached >= event->recorded ? SUCCESS : NOT_READY;
}

API cuEventSynchronize(CUevent handle) {
    ENTER("cuEventSynchronize");
    const auto event = entry.event(handle);
    if (!event) return entry.result;
    world.changed.wait(entry.lock, [&] { return event->reached >= event->recorded; });
    return world.devices[event->device].lost;
}

API cuEventElapsedTime(float* passed_ms, CUevent begin, CUevent end) {
    ENTER("cuEventElapsedTime");
    const auto first = entry.event(begin), last = entry.event(end);
    if (!first || !last || !passed_ms) return entry.refuse(INVALID_HANDLE, "no such events");
    if ((first->flags | last->flags) & 2 || !first->recorded || !last->recorded)
        return entry.refuse(INVALID_HANDLE, "events without a time");
    if (first->reached < first->recorded || last->reached < last->recorded) return NOT_READY;
    *passed_ms = float(1000 * (last->reached_s - first->reached_s));
    return SUCCESS;
}

API cuEventDestroy_v2(CUevent handle) {
    Entry entry("cuEventDestroy_v2");
    return give_back(entry, [&] {
        if (entry.event(handle)) world.events.erase(number(handle));
        return entry.result;
    });
}

// ---- what the tests ask

// Lets the `nth` call from now on of `name` ("*": of any in a context) fail with `code`.
extern "C" void fake_cuda_fail(const char* name, int nth, CUresult code) {
    const std::lock_guard<std::mutex> lock(world.lock);
    world.fails.push_back({name, nth, code});
}

extern "C" void fake_cuda_slow(unsigned slow_us) {
    const std::lock_guard<std::mutex> lock(world.lock);
    world.slow_us = slow_us;
}

extern "C" int fake_cuda_calls(const char* name) {
    const std::lock_guard<std::mutex> lock(world.lock);
    return world.calls[name];
}

extern "C" int fake_cuda_current() {
    const std::lock_guard<std::mutex> lock(world.lock);
    return world.initialised && !stack_of_thread().empty() ? stack_of_thread().back() : -1;
}

// How many there are of: device memory, page-locked memory, streams, events.
extern "C" void fake_cuda_held(int counts[4]) {
    const std::lock_guard<std::mutex> lock(world.lock);
    counts[0] = counts[1] = 0;
    for (const auto& each : world.memory) ++counts[each.second.pinned];
    counts[2] = int(world.streams.size());
    counts[3] = int(world.events.size());
}

// What callers did wrong since the last call, red zones among it, once all work is done. All is
// well again afterwards: a lost context, calls that were to fail, slow streams.
extern "C" const char* fake_cuda_end() {
    static std::string told;
    std::unique_lock<std::mutex> lock(world.lock);
    for (auto& each : world.streams) drain(lock, *each.second);
    world.changed.wait(lock, [] { return world.closing == 0; });
    for (Device& each : world.devices) {
        if (each.default_stream) drain(lock, *each.default_stream);
        each.lost = SUCCESS;
    }
    for (const auto& each : world.memory) check_red("at the end", each.first, each.second);
    world.fails.clear();
    world.slow_us = 0;
    told.swap(world.faults);
    world.faults.clear();
    return told.c_str();
}
