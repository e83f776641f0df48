#pragma once
// The bytes of a Python object that has some, for as long as the view lives.

#include <pybind11/pybind11.h>

#include <cstddef>

namespace kvwire {

class BufferView {
public:
    enum class Access { READ = PyBUF_C_CONTIGUOUS, WRITE = PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE };

    // Throws BufferError where the bytes are not C-contiguous, or may not be written.
    explicit BufferView(const pybind11::object& source, Access access = Access::READ) {
        if (PyObject_GetBuffer(source.ptr(), &view_, static_cast<int>(access)) != 0)
            throw pybind11::error_already_set();
    }
    ~BufferView() { PyBuffer_Release(&view_); }
    BufferView(const BufferView&) = delete;
    BufferView& operator=(const BufferView&) = delete;

    void* data() const { return view_.buf; }
    size_t size() const { return static_cast<size_t>(view_.len); }

private:
    Py_buffer view_;
};

}  // namespace kvwire
