package vfs

import (
	"errors"
	"syscall"
)

// IsNoSpace reports whether err says that the file system is full.
func IsNoSpace(err error) bool {
	const handleDiskFull, diskFull = syscall.Errno(39), syscall.Errno(112)
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, handleDiskFull) || errors.Is(err, diskFull)
}
