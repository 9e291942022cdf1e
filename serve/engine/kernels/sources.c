// Which sources a library was built from, as setup.py counted them: library.py takes none that does not fit its files.

#include "common.h"

API const char *heed_sources(void) { return HEED_SOURCES; }
