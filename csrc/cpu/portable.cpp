// The kernels in plain C++.
#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <type_traits>

#include "kernels.h"

#define DS_TABLE portable_kernels
#include "families.h"
