// Spreads one call of the op over CPU threads.
#pragma once
#include "api.h"

namespace emovec {

// The form numbered `kernel`; 0: the fastest that this processor has. Null if it cannot run.
const ev_cpu_form* cpu_form(int32_t kernel);

void run(const ev_args& args, const ev_cpu_form& form);

}  // namespace emovec
