package vfs

import (
	"os"
	"syscall"
)

// openFile allows others to rename and remove the file while it is open, as
// other systems do.
func openFile(name string, flag int) (*os.File, error) {
	mode := uint32(syscall.OPEN_EXISTING)
	if flag&os.O_CREATE != 0 {
		mode = syscall.CREATE_NEW
	}
	const fileShareDelete = 4
	share := uint32(syscall.FILE_SHARE_READ | syscall.FILE_SHARE_WRITE | fileShareDelete)
	return createFile(name, share, mode)
}

func createFile(name string, share, mode uint32) (*os.File, error) {
	p, err := syscall.UTF16PtrFromString(name)
	if err != nil {
		return nil, err
	}
	h, err := syscall.CreateFile(p, syscall.GENERIC_READ|syscall.GENERIC_WRITE, share, nil, mode, syscall.FILE_ATTRIBUTE_NORMAL, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return os.NewFile(uintptr(h), name), nil
}

// syncDir does nothing: Windows has no call for it, and NTFS journals
// directory changes.
func syncDir(string) error { return nil }

func inode(name string, info os.FileInfo) (uint64, error) {
	if info.IsDir() {
		return 0, nil
	}
	f, err := os.Open(name)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var d syscall.ByHandleFileInformation
	if err := syscall.GetFileInformationByHandle(syscall.Handle(f.Fd()), &d); err != nil {
		return 0, &os.PathError{Op: "stat", Path: name, Err: err}
	}
	return uint64(d.FileIndexHigh)<<32 | uint64(d.FileIndexLow), nil
}

// lockFile opens the file shared with nobody.
func lockFile(name string) (*os.File, error) {
	f, err := createFile(name, 0, syscall.OPEN_ALWAYS)
	const sharingViolation = syscall.Errno(32)
	if pe, ok := err.(*os.PathError); ok && pe.Err == sharingViolation {
		return nil, ErrLocked
	}
	return f, err
}
