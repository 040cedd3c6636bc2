package wal

import (
	"errors"
	"fmt"
)

var (
	// ErrFailed is matched by every error of a log that has failed: a write or
	// a sync went wrong, so nothing is known about what had not been
	// acknowledged. The error wraps the cause too. The only way on is to close
	// the log and open it again.
	ErrFailed = errors.New("wal: the log has failed and accepts nothing more; close it, repair the disk, open it again")
	// ErrDiskFull is matched if there was no space for the next segment. It is
	// no failure: nothing was written, what was appended is still there, and
	// Flush may be called again.
	ErrDiskFull = errors.New("wal: no space for the next segment; free some space on this file system")
	// ErrClosed is returned after Close.
	ErrClosed = errors.New("wal: the log is closed")
	// ErrReleased is returned by ReadAt for a position whose segment has been
	// given back after Release.
	ErrReleased = errors.New("wal: this position has been released; a snapshot covers it")
	// ErrNoRecord is returned by ReadAt for a position at which no record of
	// this log begins.
	ErrNoRecord = errors.New("wal: no record begins at this position")
)

// CorruptError says that what is on disk cannot be the result of a crash. The
// log refuses to go on, because shortening it silently would lose what was
// acknowledged.
type CorruptError struct {
	File   string // path
	Offset int64  // in bytes
	Found  string // what is there, and what should be
	Do     string // what the operator can do
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("wal: %s is corrupt at offset %d: found %s; %s", e.File, e.Offset, e.Found, e.Do)
}

const doReplace = "nothing was changed; restore this directory from a backup, or remove this node from the cluster and add it again with an empty directory"

func corrupt(file string, off int64, format string, args ...any) error {
	return &CorruptError{File: file, Offset: off, Found: fmt.Sprintf(format, args...), Do: doReplace}
}

// lost says that a log holds nothing which held something.
func lost(dir string) error {
	return &CorruptError{File: dir, Found: "no record, in a log that has held some: it was deleted, or is on a file system that is not mounted", Do: doFind}
}

const doFind = "nothing was changed; bring the log back to where it was; if it is lost, remove this node from the cluster and add it again with an empty directory"

// VersionError says that a file was written by a newer version of this
// library.
type VersionError struct {
	File       string
	Found, Max uint32 // versions of the format
}

func (e *VersionError) Error() string {
	return fmt.Sprintf("wal: %s has format version %d, and this program reads versions up to %d; nothing was changed; run the newer program", e.File, e.Found, e.Max)
}

// TagError says that a segment belongs to another directory.
type TagError struct {
	File        string
	Found, Want [16]byte
}

func (e *TagError) Error() string {
	return fmt.Sprintf("wal: %s belongs to directory %x, and this is directory %x; nothing was changed; move the file back to where it came from", e.File, e.Found, e.Want)
}
