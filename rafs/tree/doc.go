// Package tree is a file tree in memory: what converters build from tars and directories, what layers are merged in, and
// what the bootstrap writer writes and the bootstrap reader can give back.
//
// It never reads file data: a regular file's content is a list of references to chunks of blobs.
//
// Invariants:
//   - names are 1 to 255 bytes, without '/' and NUL, and are not "." or "..";
//   - hard links are entries that share one *Inode, and only non-directories are shared;
//   - a tree's bytes do not depend on the order in which entries were added: children are sorted by name, xattrs by name.
package tree
