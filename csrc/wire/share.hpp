#pragma once
// Bytes that a link keeps on behalf of its peer, counted for the link and for all links of an
// endpoint together. Under the lock that those share.

#include <cstdint>
#include <memory>

namespace kvwire {

struct Pool {
    uint64_t bytes = 0;
    uint64_t bytes_max = uint64_t(256) << 20;
};

class Share {
public:
    explicit Share(std::shared_ptr<Pool> pool)
        : pool_(pool ? std::move(pool) : std::make_shared<Pool>()) {}
    Share(const Share&) = delete;
    ~Share() { *this -= bytes_; }

    bool has_room(uint64_t bytes, uint64_t own_max) const {
        return bytes_ + bytes <= own_max && pool_->bytes + bytes <= pool_->bytes_max;
    }
    void operator+=(uint64_t bytes) { add(bytes); }
    void operator-=(uint64_t bytes) { add(0 - bytes); }
    uint64_t bytes() const { return bytes_; }

private:
    void add(uint64_t bytes) {
        bytes_ += bytes;
        pool_->bytes += bytes;
    }
    const std::shared_ptr<Pool> pool_;
    uint64_t bytes_ = 0;
};

}  // namespace kvwire
