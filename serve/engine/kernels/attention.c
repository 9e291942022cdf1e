#include "common.h"

API int heed_width(void) { return WIDTH; }
