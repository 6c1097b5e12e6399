// Package enginetest is the conformance suite of fscache engines: what the daemon relies on, one rule a test. Every
// engine passes it on its real kernel, and fscache/simkernel passes it too, so that what the simulator promises the
// kernel was seen to do.
//
// It is imported by tests only. A test binary that links it needs nothing from the repository at run time and no cgo: it
// can be copied into a virtual machine.
//
// Images are made here, one block of EROFS metadata each, in which every blob is one file: byte n of the file is byte n
// of the blob's cache object. So the suite depends on no image format code, and a bug there does not hide one here.
package enginetest
