//go:build !(darwin || dragonfly || freebsd || linux || netbsd || openbsd || windows)

package vfs

import (
	"errors"
	"os"
	"runtime"
)

// lockFile refuses: without a lock two processes could write one log.
func lockFile(string) (*os.File, error) {
	return nil, errors.New("file locks are not supported on " + runtime.GOOS)
}
