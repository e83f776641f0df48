#include "transport/zero_copy.hpp"

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <linux/errqueue.h>
#include <netinet/in.h>
#include <sys/socket.h>

namespace kvwire {

ZeroCopy zero_copy_mode(ZeroCopy wished) {
    const char* forced = std::getenv("KVWIRE_ZEROCOPY");
    if (!forced || !*forced) return wished;
    if (std::strcmp(forced, "0") == 0) return ZeroCopy::OFF;
    if (std::strcmp(forced, "1") == 0) return ZeroCopy::ALWAYS;
    throw Error(ErrorCode::USAGE,
                std::string("KVWIRE_ZEROCOPY is \"") + forced + "\"; it can be 0 or 1");
}

const char* name(ZeroCopy mode) {
    return mode == ZeroCopy::OFF ? "off" : mode == ZeroCopy::ON ? "on" : "always";
}

int enable_zero_copy(const Fd& fd) {
    const int one = 1;
    return ::setsockopt(fd.get(), SOL_SOCKET, SO_ZEROCOPY, &one, sizeof one) == 0 ? 0 : errno;
}

bool is_passing(int refusal) { return refusal == ENOBUFS; }

IoResult send_zero_copy(const Fd& fd, const iovec* iov, size_t iov_count, int* refusal) {
    msghdr message{};
    message.msg_iov = const_cast<iovec*>(iov);
    message.msg_iovlen = iov_count;
    const ssize_t bytes =
        ::sendmsg(fd.get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL | MSG_ZEROCOPY);
    *refusal = 0;
    if (bytes >= 0) return {IoStatus::OK, size_t(bytes), 0};
    if (is_passing(errno) || errno == EPERM || errno == EINVAL || errno == EOPNOTSUPP) {
        *refusal = errno;
        return send(fd, iov, iov_count);
    }
    if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)
        return {IoStatus::WOULD_BLOCK, 0, 0};
    return {IoStatus::FAILED, 0, errno};
}

bool read_notice(const Fd& fd, Notice* notice) {
    for (;;) {
        alignas(cmsghdr) char control[CMSG_SPACE(sizeof(sock_extended_err) + sizeof(sockaddr_in6))];
        msghdr message{};
        message.msg_control = control;
        message.msg_controllen = sizeof control;
        if (::recvmsg(fd.get(), &message, MSG_ERRQUEUE | MSG_DONTWAIT) < 0) return false;
        for (cmsghdr* each = CMSG_FIRSTHDR(&message); each; each = CMSG_NXTHDR(&message, each)) {
            const bool is_error =
                (each->cmsg_level == SOL_IP && each->cmsg_type == IP_RECVERR) ||
                (each->cmsg_level == SOL_IPV6 && each->cmsg_type == IPV6_RECVERR);
            if (!is_error) continue;
            sock_extended_err word;
            std::memcpy(&word, CMSG_DATA(each), sizeof word);
            if (word.ee_origin != SO_EE_ORIGIN_ZEROCOPY || word.ee_errno != 0) continue;
            *notice = {word.ee_info, word.ee_data,
                       (word.ee_code & SO_EE_CODE_ZEROCOPY_COPIED) != 0};
            return true;
        }
    }
}

void reset_connection(const Fd& fd) {
    sockaddr nobody{};
    nobody.sa_family = AF_UNSPEC;
    ::connect(fd.get(), &nobody, sizeof nobody);
}

}  // namespace kvwire
