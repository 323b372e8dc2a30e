// The engine for any CPU.
#include "vector_portable.h"
//
#include "run.h"
