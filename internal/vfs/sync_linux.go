package vfs

import (
	"os"
	"syscall"
)

// datasync is fdatasync: it writes no timestamps, so that a sync after a write
// into space that has been written before changes no metadata.
func datasync(f *os.File) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = conn.Control(func(fd uintptr) {
		// An interrupted call has reported nothing yet, so it is made again.
		for serr = syscall.EINTR; serr == syscall.EINTR; {
			serr = syscall.Fdatasync(int(fd))
		}
	})
	if err != nil {
		return err
	}
	if serr != nil {
		return &os.PathError{Op: "fdatasync", Path: f.Name(), Err: serr}
	}
	return nil
}
