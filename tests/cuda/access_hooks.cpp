// The reports of a checked build, for libraries that have no other file of their own to put them into.
#include "emulation/access_hooks.h"
