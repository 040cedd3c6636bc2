package main

import (
	"context"
	"fmt"
)

// System is one replicated log of three nodes in this process, each with its
// own directory and talking over TCP on loopback. Every system is driven by
// the same clients (drive.go), so their figures can be compared.
type System interface {
	// Start creates three nodes under dir, which exists and is empty, and
	// returns when the system accepts proposals. What it prepares ahead is not
	// measured.
	Start(dir string) error

	// Propose replicates payload and returns nil once it is fsynced on two of
	// the three nodes and, where the system has a state machine, applied.
	// It does not keep payload. Any number of goroutines may call it.
	Propose(ctx context.Context, payload []byte) error

	// Check is called after the last Propose has returned and before Stop. It
	// reports whether the round counts: ops proposals, size bytes each, were
	// acknowledged since Start, warm-up included.
	Check(ops int64, size int) error

	// Stop ends the system and every goroutine it started. Proposals still
	// waiting return an error.
	Stop() error
}

// pumpName is the system that every ratio is taken against.
const pumpName = "pump"

// systemNames lists what newSystem knows, in the order of the help text.
func systemNames() []string { return []string{pumpName, "raft"} }

// newSystem returns a fresh, unstarted system.
func newSystem(name string) (System, error) {
	switch name {
	case pumpName:
		return newPump(pumpRegion), nil
	case "raft":
		return newRaft()
	}
	return nil, fmt.Errorf("unknown system %q; choose from %v", name, systemNames())
}
