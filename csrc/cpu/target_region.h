// Compiles a region of a file for one instruction set, whatever the file's own flags are.
//
// Open the region after every standard header: what is instantiated from them keeps the portable
// target, so no vector copy of a standard function can become the one that the linker keeps for
// everybody.
#pragma once

#define KVS_PRAGMA(text) _Pragma(#text)
#define KVS_TARGET_REGION(isa) KVS_PRAGMA(GCC push_options) KVS_PRAGMA(GCC target(isa))
#define KVS_UNTARGET_REGION KVS_PRAGMA(GCC pop_options)
