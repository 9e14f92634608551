// What the library shows to the outside: everything else is hidden.
#pragma once

#define IRKIT_API __attribute__((visibility("default")))
