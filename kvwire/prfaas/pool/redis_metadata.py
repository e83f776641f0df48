"""`RedisIndex`: the global index in Redis or Valkey, alone or as a cluster.

    kvwire:{<tenant key>.<head>}:<hash>     a hash of one block: field <node> for its KV, <node>\\0s
                                            for its checkpoint, value the node's incarnation
    kvwire:node:<node>                      the node's incarnation; expires unless it is renewed
    kvwire:nodes                            the set of all nodes

Keys and hashes are hexadecimal. The braces are Redis' hash tag: all blocks of a prefix lie in one
slot of a cluster, so that a match asks one server, a few round trips in all; no command names two
keys. What was said by an incarnation that no longer lives counts for nothing, so that a node that
begins anew need not find what it has said before; it is overwritten, or expires.

The index may be gone at any time. Then `match` finds nothing, within `timeout_s`, and requests are
prefilled where they are; `IndexPublisher` says everything again when it is back.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from kvwire.errors import ErrorCode, TransferError, UsageError
from kvwire.prfaas.pool.blocks import Chain
from kvwire.prfaas.pool.metadata import NodeMatch

__all__ = ["RedisIndex"]

_BATCH_COMMANDS = 512
_FIRST_BLOCKS = 16
_RETRY_FIRST_S, _RETRY_MAX_S = 0.1, 5.0
_STATE = b"\0s"


class RedisIndex:
    """See `GlobalIndex`. `publish`, `withdraw`, `forget` and `announce` raise `TransferError` when
    the server cannot be reached; `match` then returns nothing.

    Args:
        url: "redis://host:port/0", "rediss://..." for TLS; of a cluster, any of its nodes.
        cluster: the server is in Cluster mode.
        states: the models have states; False: every block that is held can be used.
        timeout_s: for connecting and for each answer.
        node_ttl_s: a node that has not announced itself for so long is taken for dead.
        entry_ttl_s: entries are dropped after so long, unless they were said again.
        refresh_s: how old the list of living nodes may be.
        prefix: of all keys.

    Raises: UsageError: the package redis is not installed, or the URL is none.
    """

    def __init__(self, url: str, *, cluster: bool = False, states: bool = True,
                 timeout_s: float = 0.25, node_ttl_s: float = 10.0,
                 entry_ttl_s: float = 6 * 3600.0, refresh_s: float = 1.0,
                 prefix: str = "kvwire"):
        self._connect = _connector(url, cluster, timeout_s)
        self._with_states, self._prefix = states, prefix
        self._node_ttl_ms = int(node_ttl_s * 1000)
        self._entry_ttl_ms = int(entry_ttl_s * 1000)
        self._refresh_s = refresh_s
        self._lock = threading.Lock()
        self._client: object | None = None
        self._incarnations: dict[str, bytes] = {}
        self._live: dict[bytes, bytes] = {}
        self._live_until_s = 0.0
        self._retry_s, self._down_until_s = _RETRY_FIRST_S, 0.0

    @property
    def available(self) -> bool:
        """False while the server is not asked, because it did not answer a moment ago."""
        return time.monotonic() >= self._down_until_s

    def close(self) -> None:
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    # ---- say

    def announce(self, node: str) -> bool:
        """Say that `node` lives; False when the server did not know, so that all that the node has
        said may be lost and must be said again."""
        incarnation = self._incarnation(node)
        with self._asking() as client:
            pipe = client.pipeline(transaction=False)
            pipe.get(self._node_key(node))
            pipe.set(self._node_key(node), incarnation, px=self._node_ttl_ms)
            pipe.sadd(f"{self._prefix}:nodes", node)
            known = pipe.execute()[0] == incarnation
            self._live_until_s = 0.0
            return known

    def publish(self, node: str, chain: Chain, hashes: Sequence[bytes],
                states: Sequence[bytes] = ()) -> None:
        incarnation, field = self._incarnation(node), node.encode()
        self._send(command for names, suffix in ((hashes, b""), (states, _STATE))
                   for key in self._keys(chain, names)
                   for command in (("HSET", key, field + suffix, incarnation),
                                   ("PEXPIRE", key, self._entry_ttl_ms)))

    def withdraw(self, node: str, chain: Chain, hashes: Sequence[bytes], *,
                 states_only: bool = False) -> None:
        field = node.encode()
        fields = (field + _STATE,) if states_only else (field, field + _STATE)
        self._send(("HDEL", key, *fields) for key in self._keys(chain, hashes))

    def forget(self, node: str) -> None:
        with self._lock:
            self._incarnations.pop(node, None)
        self._live_until_s = 0.0
        self._send((("DEL", self._node_key(node)), ("SREM", f"{self._prefix}:nodes", node)))

    # ---- ask

    def match(self, tenant_key: bytes, hashes: Sequence[bytes]) -> dict[str, NodeMatch]:
        if not hashes or not self.available:
            return {}
        try:
            with self._asking() as client:
                return self._match(client, Chain(tenant_key, hashes[0]), hashes)
        except TransferError:
            return {}

    def _match(self, client: object, chain: Chain, hashes: Sequence[bytes]
               ) -> dict[str, NodeMatch]:
        live = self._living(client)
        found: dict[bytes, list[int]] = {}
        at, count, holders = 0, _FIRST_BLOCKS, set(live)
        while at < len(hashes) and holders:
            keys = self._keys(chain, hashes[at:at + count])
            for entries in self._ask(client, [("HGETALL", key) for key in keys]):
                at += 1
                holders &= {field for field, incarnation in entries.items()
                            if live.get(field) == incarnation}
                for node in holders:
                    said = found.setdefault(node, [0, 0])
                    said[0] = at
                    if not self._with_states or entries.get(node + _STATE) == live[node]:
                        said[1] = at
                if not holders:
                    break
            count *= 2
        return {node.decode(): NodeMatch(*said) for node, said in found.items()}

    def _living(self, client: object) -> dict[bytes, bytes]:
        """Return the incarnation of each node that lives."""
        now = time.monotonic()
        if now >= self._live_until_s:
            nodes = sorted(client.smembers(f"{self._prefix}:nodes"))
            values = self._ask(client, [("GET", self._node_key(node.decode(errors="replace")))
                                        for node in nodes])
            self._live = {node: value for node, value in zip(nodes, values) if value}
            self._live_until_s = now + self._refresh_s
        return self._live

    # ---- the server

    def _incarnation(self, node: str) -> bytes:
        with self._lock:
            return self._incarnations.setdefault(node, secrets.token_hex(8).encode())

    def _node_key(self, node: str) -> str:
        return f"{self._prefix}:node:{node}"

    def _keys(self, chain: Chain, names: Iterable[bytes]) -> Iterator[str]:
        head = f"{self._prefix}:{{{chain.tenant_key.hex()}.{chain.head.hex()}}}:"
        return (head + name.hex() for name in names)

    def _send(self, commands: Iterable[tuple]) -> None:
        with self._asking() as client:
            batch: list[tuple] = []
            for command in commands:
                batch.append(command)
                if len(batch) >= _BATCH_COMMANDS:
                    self._ask(client, batch)
                    batch = []
            self._ask(client, batch)

    @staticmethod
    def _ask(client: object, commands: Sequence[tuple]) -> list:
        if not commands:
            return []
        pipe = client.pipeline(transaction=False)
        for command in commands:
            pipe.execute_command(*command)
        return pipe.execute()

    @contextmanager
    def _asking(self) -> Iterator[object]:
        """Yield the client; after a failure nobody waits for the server again for a while."""
        import redis
        if not self.available:
            raise TransferError("the metadata server did not answer a moment ago; it is asked "
                                "again soon", code=ErrorCode.CONNECT_FAILED)
        try:
            with self._lock:
                if self._client is None:
                    self._client = self._connect()
                client = self._client
            yield client
            self._retry_s = _RETRY_FIRST_S
        except (redis.RedisError, OSError) as error:
            self._down_until_s = time.monotonic() + self._retry_s
            self._retry_s = min(2 * self._retry_s, _RETRY_MAX_S)
            self._live_until_s = 0.0
            raise TransferError(f"the metadata server failed: {error}; requests go without it",
                                code=ErrorCode.CONNECT_FAILED) from error


def _connector(url: str, cluster: bool, timeout_s: float) -> Callable[[], object]:
    try:
        import redis
    except ImportError:
        raise UsageError("RedisIndex needs the package redis: pip install "
                         "'kvwire[redis]'") from None
    from redis.backoff import NoBackoff
    from redis.retry import Retry
    kind = redis.RedisCluster if cluster else redis.Redis
    # One more try: the first command after a restart meets a connection that is gone.
    options = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s,
               "retry": Retry(NoBackoff(), 1)}
    try:
        redis.connection.parse_url(url)
    except ValueError as error:
        raise UsageError(f"url is {url!r}: {error}") from None
    return lambda: kind.from_url(url, **options)
