"""Every maximum of FORMAT.md §10, with the document's names in upper case."""

from kvwire.errors import InternalError

CHUNK_BYTES_MIN = 4096
CHUNK_BYTES_MAX = 4_194_304
PAYLOAD_BYTES_MIN = 65_536
CONTROL_BYTES_MIN = 65_536
CONTROL_BYTES_MAX = 1_048_576
INDEX_BYTES_MAX = 67_108_864
LANE_COUNT_MAX = 64
RANK_COUNT_MAX = 4096
GROUP_COUNT_MAX = 64
TENSOR_COUNT_MAX = 16
LAYER_COUNT_MAX = 4096
AXIS_COUNT_MAX = 5
SLICE_COUNT_MAX = 16
EXTENT_MAX = 16_777_216
NAME_BYTES_MAX = 255
METADATA_COUNT_MAX = 64
METADATA_BYTES_MAX = 65_536
MESSAGE_BYTES_MAX = 1024
ITEM_COUNT_MAX = 4096
RECEIPT_COUNT_MAX = 4096
REPAIR_COUNT_MAX = 2730
SEGMENT_COUNT_MAX = 65_536
SEGMENT_BYTES_MAX = 1_099_511_627_776
TOKEN_COUNT_MAX = 4_294_967_296
ATTEMPTS_MAX = 8
ATTEMPT_MAX = 65535
LEAF_COUNT_MAX = 262144
WAITING_MANIFESTS_MAX = 64
ENDED_TRANSFERS_MIN = 4096
GREETING_TIMEOUT_MS = 5000

_RELATIONS = {
    "the largest chunk is on the grid of chunks": CHUNK_BYTES_MAX % CHUNK_BYTES_MIN == 0,
    "the smallest chunk fits every peer": CHUNK_BYTES_MIN <= PAYLOAD_BYTES_MIN,
    "a full SEGMENT fits": 16 + 24 * ITEM_COUNT_MAX <= CONTROL_BYTES_MAX,
    "a full RECEIPT fits every peer": 16 * RECEIPT_COUNT_MAX <= CONTROL_BYTES_MIN,
    "a full REPAIR fits every peer": 24 * REPAIR_COUNT_MAX <= CONTROL_BYTES_MIN,
    "one more REPAIR entry would not": 24 * (REPAIR_COUNT_MAX + 1) > CONTROL_BYTES_MIN,
    "a full END fits": 24 + METADATA_BYTES_MAX <= CONTROL_BYTES_MAX,
    "an ABORT fits every peer": 32 + MESSAGE_BYTES_MAX <= CONTROL_BYTES_MIN,
    "chunks of a segment are countable": SEGMENT_BYTES_MAX // CHUNK_BYTES_MIN < 1 << 32,
    "the index of 2 TiB in chunks of 256 KiB fits": 8 * (1 << 41 >> 18) <= INDEX_BYTES_MAX,
}
for _relation, _holds in _RELATIONS.items():
    if not _holds:
        raise InternalError(f"limits: {_relation} no longer holds")
