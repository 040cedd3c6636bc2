// Package vfs is the file system as an interface, as small as a write-ahead
// log and a snapshot store need it. OS is the real one. Mem lives in memory,
// is deterministic, and can lose power, fail, stall and rot on request.
package vfs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"syscall"
)

// FS is a file system. Names are paths in the host's notation. An FS may be
// used by several goroutines at once.
//
// A change of a directory (a file created, renamed or removed) survives a
// power cut for certain only after SyncDir of that directory has returned nil.
// The content of a file survives for certain only after File.Sync.
type FS interface {
	// Create makes a new, empty file, open for reading and writing. It fails
	// with fs.ErrExist if the name is taken.
	Create(name string) (File, error)
	// Open opens an existing file for reading and writing.
	Open(name string) (File, error)
	// Remove deletes a file. Open handles stay usable.
	Remove(name string) error
	// Rename moves a file within its directory and replaces what has the new
	// name, atomically: a power cut leaves the old state or the new one.
	Rename(oldname, newname string) error
	// List returns the names (not paths) in a directory, sorted.
	List(dir string) ([]string, error)
	// MkdirAll creates a directory and its missing parents, and makes all of
	// them durable.
	MkdirAll(dir string) error
	// SyncDir makes the entries of a directory durable.
	SyncDir(dir string) error
	// Lock takes an exclusive lock on a file, which is created if needed. It
	// does not wait: if the lock is held, by this or another process, the
	// error matches ErrLocked. Close of the result releases it, and so does
	// the end of the process.
	Lock(name string) (io.Closer, error)
	// Stat describes a file or directory.
	Stat(name string) (Info, error)
}

// File is an open file. Reads may run beside reads and writes; the caller
// orders writes to the same bytes.
type File interface {
	io.ReaderAt
	io.WriterAt
	// Sync makes the content durable, and the size if it is needed to read the
	// content. After an error nothing is known about what had not been synced
	// before: the data may read fine and not be on disk, and a second Sync may
	// return nil without having written it.
	Sync() error
	// Size returns the length in bytes.
	Size() (int64, error)
	// Truncate sets the length in bytes. Bytes that are added read as zero.
	Truncate(size int64) error
	Close() error
}

// Info describes a file.
type Info struct {
	Size  int64  // in bytes
	Inode uint64 // stays with a file when it is renamed; a copy has another one; 0 if unknown
	Dir   bool
}

// ErrLocked is matched by the error of a Lock that somebody else holds.
var ErrLocked = errors.New("locked by another process or by another opener in this one")

// errRenameAcross explains why Rename stays within one directory.
var errRenameAcross = errors.New("vfs: rename across directories: it would need two directory syncs to be durable; keep both names in one directory")

// mkdirAll is MkdirAll given a way to make one directory. It also syncs the
// parents of directories that exist, because a process that was stopped
// between creating and syncing one may have left them.
func mkdirAll(fsys FS, dir string, mkdir func(string) error) error {
	dir = filepath.Clean(dir)
	parent := filepath.Dir(dir)
	if parent == dir {
		return nil
	}
	info, err := fsys.Stat(dir)
	exists := err == nil
	switch {
	case exists && !info.Dir:
		return fmt.Errorf("vfs: %s is a file where a directory is needed; move it away", dir)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return err
	}
	if err := mkdirAll(fsys, parent, mkdir); err != nil {
		return err
	}
	if !exists {
		if err := mkdir(dir); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	err = fsys.SyncDir(parent)
	if exists && (errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.EROFS)) {
		return nil // a parent that is not ours, so that dir is no work of ours either
	}
	return err
}
