package plain

import (
	"holdfast/fscache"
	"holdfast/fscache/cachefiles"
	"holdfast/fscache/fanotify"
)

// A Kind is an engine by what its cache files are without it.
type Kind struct {
	Engine string // its name

	// Verifies says whether the engine can read its cache back, so that what is on record as settled in a boot was checked or written
	// in it.
	Verifies bool

	// CacheFile is where an engine with its cache in dir has the cache file of an object. Where it can tell that there is none, the error
	// wraps os.ErrNotExist.
	CacheFile func(dir string, k fscache.Key) (string, error)
}

// Kinds are those with cache files that can be mounted.
var Kinds = []Kind{
	{Engine: fanotify.Name, Verifies: true, CacheFile: fanotify.CacheFile},
	{Engine: cachefiles.Name, CacheFile: cachefiles.CacheFile},
}
