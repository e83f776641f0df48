#pragma once
// Whether what a peer announces fits the memory that one side holds. Nothing is planned before it
// does: the planner trusts extents, ranges and tables that have passed here.

#include <string>
#include <vector>

#include "plan/placement.hpp"

namespace kvwire {

// The memory of each leaf of the item's tensor, in wire order. Throws as Placement::append does.
std::vector<const LeafMemory*> match_leaves(const GroupDesc& group, const Item& item,
                                            const MemoryMap& memory);

}  // namespace kvwire
