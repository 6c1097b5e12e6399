// Package erofs mounts and unmounts EROFS, for the engines that do.
//
// It never decides what to mount, and never follows a symbolic link in a mount point's last name.
//
// NewApart makes a mount in a process of its own, a helper. The helper is the running binary once more, known by argv[0] in an init
// function of this package, so that every binary which has this package has the helper: the product, and the test binaries of all
// packages above. In such a process no main function runs, no test, and of other packages only what they initialise before this one.
//
// What NewApart keeps:
//   - the helper has standard input, output and error and one socket, and none of the descriptors, locks or variables of the process that
//     started it: whoever is gone has left nothing in it;
//   - a mount nobody took is undone: a detached mount lives as long as its descriptor, which is the helper's, the message's, or the caller's.
//
// golang.org/x/sys/unix is here for fsopen and friends, and for descriptors in messages, which the standard library does not have outside
// of package net. They and not mount(2): its options end at a page, an image of 60 layers has more.
package erofs
