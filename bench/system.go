package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"sync/atomic"
	"time"
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

// counts is the state of every system's state machine, the one with the least
// work: how many commands it applied, and their bytes.
type counts struct {
	commands, bytes atomic.Int64
}

// add applies one command.
func (c *counts) add(command []byte) {
	c.commands.Add(1)
	c.bytes.Add(int64(len(command)))
}

// check is an error unless ops commands of size bytes each were applied.
func (c *counts) check(ops int64, size int) error {
	if got := c.commands.Load(); got != ops {
		return fmt.Errorf("the leader applied %d commands, but %d were acknowledged", got, ops)
	}
	if got, want := c.bytes.Load(), ops*int64(size); got != want {
		return fmt.Errorf("the leader applied %d bytes, but %d were acknowledged", got, want)
	}
	return nil
}

// encode returns the state as a snapshot keeps it.
func (c *counts) encode() []byte {
	b := binary.LittleEndian.AppendUint64(nil, uint64(c.commands.Load()))
	return binary.LittleEndian.AppendUint64(b, uint64(c.bytes.Load()))
}

// decode replaces the state by that of a snapshot.
func (c *counts) decode(b []byte) error {
	if len(b) != 16 {
		return fmt.Errorf("a snapshot of %d bytes, want 16", len(b))
	}
	c.commands.Store(int64(binary.LittleEndian.Uint64(b)))
	c.bytes.Store(int64(binary.LittleEndian.Uint64(b[8:])))
	return nil
}

// formation bounds how long three fresh nodes may take to have a leader.
const formation = 30 * time.Second

// pumpName is the system that every ratio is taken against.
const pumpName = "pump"

// systemNames lists what newSystem knows, in the order of the help text.
func systemNames() []string {
	return []string{pumpName, "raft", "hashicorp", "etcd", "etcd-packed"}
}

// newSystem returns a fresh, unstarted system.
func newSystem(name string) (System, error) {
	switch name {
	case pumpName:
		return newPump(pumpRegion), nil
	case "raft":
		return newRaft()
	case "hashicorp":
		return newHashicorp(), nil
	case "etcd":
		return newEtcd(false), nil
	case "etcd-packed":
		return newEtcd(true), nil
	}
	return nil, fmt.Errorf("unknown system %q; choose from %v", name, systemNames())
}
