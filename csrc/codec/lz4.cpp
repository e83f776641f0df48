#include "codec/lz4.hpp"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>

namespace kvwire {
namespace {

template <class Function>
bool find(void* library, const char* name, Function* found) {
    *found = reinterpret_cast<Function>(dlsym(library, name));
    return *found != nullptr;
}

const Lz4* load() {
    const char* wanted = std::getenv("KVWIRE_LZ4");
    if (wanted && std::strcmp(wanted, "0") == 0) return nullptr;
    void* library = dlopen("liblz4.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) return nullptr;
    static Lz4 functions;
    if (find(library, "LZ4_compress_default", &functions.compress) &&
        find(library, "LZ4_decompress_safe", &functions.decompress)) {
        return &functions;
    }
    dlclose(library);
    return nullptr;
}

}  // namespace

const Lz4* lz4_library() {
    static const Lz4* const library = load();
    return library;
}

}  // namespace kvwire
