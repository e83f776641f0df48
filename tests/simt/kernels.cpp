// The kernels of kernels/cuda, for simt_launch.
#include "kvwire.cu"

KERNEL(kvwire_pack_1);
KERNEL(kvwire_pack_2);
KERNEL(kvwire_pack_4);
KERNEL(kvwire_pack_8);
KERNEL(kvwire_pack_16);
KERNEL(kvwire_unpack_1);
KERNEL(kvwire_unpack_2);
KERNEL(kvwire_unpack_4);
KERNEL(kvwire_unpack_8);
KERNEL(kvwire_unpack_16);
KERNEL(kvwire_narrow_2);
KERNEL(kvwire_narrow_8);
KERNEL(kvwire_encode);
KERNEL(kvwire_decode);
KERNEL(kvwire_crc);
