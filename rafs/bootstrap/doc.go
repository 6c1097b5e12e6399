// Package bootstrap writes and reads the metadata of RAFS v6 images: EROFS file systems whose file data lies in other
// blobs, with Nydus's extended superblock, blob table and prefetch table beside the EROFS structures.
//
// It never reads file data, never opens files by itself, and writes one form only: extended inodes (compact ones carry
// no mtime), chunk indexes of the image's own chunk size, no chunk table (digests are in the blobs). What it reads is
// wider: compact inodes, raised chunk sizes and chunk tables as Nydus's builder writes them.
//
// # Layout written
//
//	0      zeros
//	1024   EROFS superblock (128 bytes), extended superblock (256), device slots (128 each)
//	4096*  blob table (256 bytes each), prefetch table (4 bytes each)
//	4096*  inodes, each followed by its xattrs and then its chunk indexes or inline data
//	4096*  directory and symbolic link data that is not inline
//
// where 4096* is the next multiple of 4096. Inodes lie in the order in which a walk of the tree in name order, parents
// first, meets them; so do the data blocks. A hard link has the place of its first name. An inode never crosses a 4096
// byte boundary, and neither do an inode, its xattrs and its inline data taken together: where they would, the inode
// moves to the next boundary. Data of directories and symbolic links is inline when what is left over after whole
// blocks is at most 2048 bytes (so that moving wastes less than a block of its own would) and fits with inode and xattrs.
//
// A file's chunk size is never raised above the image's, as Nydus does for files whose chunks are neighbours: it saves
// 8 bytes a chunk in a file that is on local disk, the kernel joins neighbouring chunks in one request anyway, and a
// chunk index that stands for many chunks no longer says which ones.
//
// # Invariants
//
//   - Write is a function of its argument: the same tree gives the same bytes, whatever the order it was built in.
//   - Read gives a tree that Write accepts (the limits that depend on the file's size aside, since the new file may be
//     smaller or larger), or an error; never both, never a panic (I9).
//   - Read needs memory and time in proportion to the file's size: the inodes may not claim more bytes than the file
//     has, so that overlapping ones cannot multiply, a directory has one name, and every list is allocated after its
//     length was compared with the bytes that are there.
//   - Errors wrap [ErrDamaged], [ErrUnsupported] (which names the feature) or the error of the file they came from, and
//     name the bootstrap, the path inside it where there is one, and the offset.
//
// No third-party package is used; tests check against three other readers: the kernel, erofs-utils and
// github.com/erofs/go-erofs.
package bootstrap
