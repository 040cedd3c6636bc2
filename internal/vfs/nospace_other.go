//go:build !windows

package vfs

import (
	"errors"
	"syscall"
)

// IsNoSpace reports whether err says that the file system, or this user's
// share of it, is full.
func IsNoSpace(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}
