#pragma once
#include "../api.h"

extern const ev_cpu_form ev_form_scalar, ev_form_avx2, ev_form_avx512, ev_form_avx512_bf16, ev_form_amx;
