// Result codes; raynixl/native/codes.py holds the same. Negative codes are -errno.
#pragma once

namespace raynixl {

enum Code : int { DONE = 0, PENDING = 1, TIMEOUT = 2, CANCELLED = 3, CLOSED = 4, LOST = 6, RESET = 8 };

}  // namespace raynixl
