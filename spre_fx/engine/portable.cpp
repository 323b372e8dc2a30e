// The engine for any CPU.
#include "vector_portable.h"
// Every other header is written in the vectors above.
#include "run.h"
#include "run_training.h"
