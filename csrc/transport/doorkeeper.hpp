#pragma once
// Counts the accepted connections of an endpoint, in all and by address, and those of them that are
// not admitted yet. With the endpoint's lock.

#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "wire/format.hpp"

namespace kvwire {

class Doorkeeper {
public:
    struct Limits {
        uint64_t connections_max = 1024;
        uint64_t connections_per_address_max = 512;
        uint64_t admissions_max = limits::admissions_max;
        uint64_t admissions_per_address_max = limits::admissions_per_address_max;
    };

private:
    struct Count {
        uint64_t connections = 0, waiting = 0;
    };
    struct Books {
        Limits limits;
        Count all;
        std::map<std::string, Count> by_address;
    };

public:
    explicit Doorkeeper(const Limits& limits) : books_(std::make_shared<Books>()) {
        books_->limits = limits;
    }

    // One connection: counted while it lives, and as waiting until it is admitted.
    class Entry {
    public:
        Entry() = default;
        Entry(Entry&& other) noexcept { *this = std::move(other); }
        Entry& operator=(Entry&& other) noexcept;
        ~Entry() { leave(); }
        void admitted();
        void leave();
        explicit operator bool() const { return books_ != nullptr; }

    private:
        friend class Doorkeeper;
        std::shared_ptr<Books> books_;
        std::string address_;
        bool waits_ = false;
    };

    // False: the next one stays in the backlog.
    bool has_room() const;
    // Empty: there are too many from this address.
    Entry enter(const std::string& address);

private:
    const std::shared_ptr<Books> books_;
};

}  // namespace kvwire
