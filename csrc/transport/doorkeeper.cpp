#include "transport/doorkeeper.hpp"

#include <utility>

namespace kvwire {

Doorkeeper::Entry& Doorkeeper::Entry::operator=(Entry&& other) noexcept {
    leave();
    books_ = std::move(other.books_);
    address_ = std::move(other.address_);
    waits_ = other.waits_;
    return *this;
}

void Doorkeeper::Entry::admitted() {
    if (!books_ || !std::exchange(waits_, false)) return;
    --books_->all.waiting;
    --books_->by_address[address_].waiting;
}

void Doorkeeper::Entry::leave() {
    if (!books_) return;
    admitted();
    --books_->all.connections;
    const auto here = books_->by_address.find(address_);
    if (--here->second.connections == 0) books_->by_address.erase(here);
    books_.reset();
}

bool Doorkeeper::has_room() const {
    return books_->all.connections < books_->limits.connections_max &&
           books_->all.waiting < books_->limits.admissions_max;
}

Doorkeeper::Entry Doorkeeper::enter(const std::string& address) {
    Entry entry;
    Count& here = books_->by_address[address];
    if (here.connections >= books_->limits.connections_per_address_max ||
        here.waiting >= books_->limits.admissions_per_address_max)
        return entry;
    for (Count* count : {&books_->all, &here}) {
        ++count->connections;
        ++count->waiting;
    }
    entry.books_ = books_;
    entry.address_ = address;
    entry.waits_ = true;
    return entry;
}

}  // namespace kvwire
