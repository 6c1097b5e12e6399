package image

import "path/filepath"

// BootstrapPath is the file that holds the bootstrap of an image saved in dir, as it is to be mounted.
func BootstrapPath(dir string) string { return filepath.Join(dir, savedBootstrap) }
