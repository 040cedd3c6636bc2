//go:build !linux

package raft

import "errors"

// sleptFor can't tell on this system, so there are no leases.
func sleptFor() (sleep, error) {
	return sleep{0, forever}, errors.New("raft: on this system a process can't see that the machine has slept, and leases need that")
}
