/* Everything that native._native shows to Python (declared again in _build/_native.cdef). */
#ifndef NATIVE_NATIVE_H
#define NATIVE_NATIVE_H

#include "crc32c.h"
#include "gate.h"
#include "integrity.h"
#include "nbd.h"
#include "nbd_link.h"
#include "notify.h"
#include "process.h"
#include "ring.h"
#include "xor.h"

#endif
