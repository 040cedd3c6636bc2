//go:build !linux

package vfs

import "os"

// datasync is os.File.Sync, which on macOS also empties the drive's cache.
func datasync(f *os.File) error { return f.Sync() }
