// simt.hpp has what CUDA's header of this name declares.
#pragma once
