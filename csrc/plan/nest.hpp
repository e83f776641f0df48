#pragma once
// Lays the wire order of one tensor over memory that may be ordered, cut and fused differently.

#include <vector>

#include "plan/placement.hpp"

namespace kvwire {

// The pieces of `item`, in wire order. `leaves` comes from match_leaves, one per leaf.
std::vector<Piece> plan_pieces(const TensorDesc& tensor, const Item& item,
                               const std::vector<const LeafMemory*>& leaves);

}  // namespace kvwire
