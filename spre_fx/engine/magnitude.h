// Magnitudes as integers: the bits of a number without its sign order as magnitudes do, and those
// of a NaN come last.
#pragma once

#include <limits>

#include "types.h"

namespace spre {

template <class Bits>
SPRE_INLINE Bits magnitude(Bits number) {
  return number & std::numeric_limits<Bits>::max();
}

}  // namespace spre
