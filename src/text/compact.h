/* text/compact.h: JSON as it is shown to the model and expected of it. May include base. */
#ifndef ORCD_TEXT_COMPACT_H
#define ORCD_TEXT_COMPACT_H

#include <jansson.h>

#include "base/buf.h"

/* Append JSON without spaces, numbers in their shortest form. */
void compact_json(const json_t *v, buf *out);

#endif
