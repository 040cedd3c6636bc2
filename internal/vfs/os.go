package vfs

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// OS returns the file system of the operating system.
func OS() FS { return osFS{} }

type osFS struct{}

// osFile is an *os.File whose Sync leaves out metadata that reading does not
// need, where the system can do that.
type osFile struct{ *os.File }

func (f osFile) Sync() error { return datasync(f.File) }

func (f osFile) Size() (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

func (osFS) Create(name string) (File, error) {
	return wrapFile(openFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL))
}

func (osFS) Open(name string) (File, error) { return wrapFile(openFile(name, os.O_RDWR)) }

func wrapFile(f *os.File, err error) (File, error) {
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

func (osFS) Remove(name string) error { return os.Remove(name) }

func (osFS) Rename(oldname, newname string) error {
	if filepath.Dir(oldname) != filepath.Dir(newname) {
		return errRenameAcross
	}
	return os.Rename(oldname, newname)
}

func (osFS) List(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir) // sorted by name
	if err != nil {
		return nil, err
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names, nil
}

func (o osFS) MkdirAll(dir string) error {
	return mkdirAll(o, dir, func(dir string) error { return os.Mkdir(dir, 0o700) })
}

func (osFS) SyncDir(dir string) error { return syncDir(dir) }

func (osFS) Lock(name string) (io.Closer, error) {
	f, err := lockFile(name)
	if err != nil {
		return nil, fmt.Errorf("vfs: lock %s: %w", name, err)
	}
	return f, nil
}

func (osFS) Stat(name string) (Info, error) {
	info, err := os.Stat(name)
	if err != nil {
		return Info{}, err
	}
	ino, err := inode(name, info)
	if err != nil {
		return Info{}, err
	}
	return Info{Size: info.Size(), Inode: ino, Dir: info.IsDir()}, nil
}
