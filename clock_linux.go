package raft

import (
	"fmt"
	"syscall"
	"time"
	"unsafe"
)

// The clocks of clock_gettime(2). Go measures durations by the first, which
// stands still while the machine is suspended; the second goes on.
const (
	clockMonotonic = 1
	clockBoottime  = 7
)

// sleptFor compares the two clocks. They can't be read at once: the difference is
// at least what it was before the second reading of the one that stands still,
// and at most what it was after the first.
func sleptFor() (sleep, error) {
	before, err := readClock(clockMonotonic)
	if err != nil {
		return sleep{0, forever}, err
	}
	boot, err := readClock(clockBoottime)
	if err != nil {
		return sleep{0, forever}, err
	}
	after, err := readClock(clockMonotonic)
	if err != nil {
		return sleep{0, forever}, err
	}
	return sleep{boot - after, boot - before}, nil
}

func readClock(id uintptr) (time.Duration, error) {
	var ts syscall.Timespec
	if _, _, errno := syscall.RawSyscall(syscall.SYS_CLOCK_GETTIME, id, uintptr(unsafe.Pointer(&ts)), 0); errno != 0 {
		return 0, fmt.Errorf("raft: clock %d of clock_gettime, which leases need: %w", id, errno)
	}
	return time.Duration(ts.Nano()), nil
}
