// Package erofs mounts and unmounts EROFS, for the engines that do.
//
// It never decides what to mount, and never follows a symbolic link in a mount point's last name.
//
// golang.org/x/sys/unix is here for fsopen and friends, which the standard library does not have. They and not mount(2):
// its options end at a page, an image of 60 layers has more.
package erofs
