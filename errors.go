package raft

import (
	"errors"
	"fmt"
)

// Rejections: the proposal was not appended and will never commit. It may be
// proposed again.
var (
	// ErrNoLeader: no leader took the proposal before the context ended.
	ErrNoLeader = errors.New("raft: no leader: the cluster has none, or this node can't reach it")
	// ErrOverloaded: a queue is full. Propose less, or later.
	ErrOverloaded = errors.New("raft: overloaded: the proposal queue is full, try again later")
	// ErrStopped: the node is closed, or failed; Server.Err says why.
	ErrStopped = errors.New("raft: node is stopped")
	// ErrCommandSize: the command is empty or larger than Config.MaxCommandBytes.
	ErrCommandSize = errors.New("raft: command is empty or too large")
	// ErrSuperseded: another leader's entry was committed in the proposal's place.
	ErrSuperseded = errors.New("raft: proposal was superseded by another leader's entry and will never commit")
)

// ErrOutcomeUnknown is matched by every error after which a proposal may have
// been committed, may be committed later, or may never be. Such an error also
// matches its cause: a context's error, ErrStopped, a network error.
var ErrOutcomeUnknown = errors.New("raft: outcome unknown")

var errResultDropped = errors.New("raft: entry was applied, but its result is no longer held")

func outcomeUnknown(cause error) error { return &unknownError{cause} }

type unknownError struct{ cause error }

func (e *unknownError) Error() string {
	return "raft: outcome unknown: the command may have been committed or may be later: " + e.cause.Error()
}
func (e *unknownError) Is(target error) bool { return target == ErrOutcomeUnknown }
func (e *unknownError) Unwrap() error        { return e.cause }

// StillRunningError is returned by Close when a call into the state machine or
// the disk does not return. Everything else is stopped. That call's goroutine
// ends with the call; Done is closed then, and a further Close waits again.
type StillRunningError struct {
	Apply Index // of the entry whose Apply runs, 0 if none does
	Flush bool  // a write or fsync of the log runs
}

func (e *StillRunningError) Error() string {
	switch {
	case e.Apply != 0 && e.Flush:
		return fmt.Sprintf("raft: closed, but Apply of entry %d and a write of the log have not returned; call Close again to wait", e.Apply)
	case e.Apply != 0:
		return fmt.Sprintf("raft: closed, but Apply of entry %d has not returned; call Close again to wait", e.Apply)
	}
	return "raft: closed, but a write or fsync of the log has not returned; call Close again to wait"
}

// ApplyError is why a node that still replicates and votes applies nothing any
// more: the state machine panicked. The entry is never skipped.
type ApplyError struct {
	Index Index
	Value any    // what panic was called with
	Stack string // of the panic
}

func (e *ApplyError) Error() string {
	return fmt.Sprintf("raft: state machine panicked applying entry %d: %v; fix it and restart the node\n%s", e.Index, e.Value, e.Stack)
}

// IdentityError refuses a data directory that is not this node's.
type IdentityError struct {
	Path  string // file
	Found string // what it says
	Want  string // what the configuration says
	Do    string // what to do
}

func (e *IdentityError) Error() string {
	return fmt.Sprintf("raft: %s: found %s, want %s: %s", e.Path, e.Found, e.Want, e.Do)
}

// CorruptError refuses data that is damaged. Nothing was changed.
type CorruptError struct {
	File   string
	Offset int64 // bytes from the file's beginning
	Found  string
	Do     string // what to do
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("raft: %s is corrupt at offset %d: %s: %s", e.File, e.Offset, e.Found, e.Do)
}

func invariantError(format string, args ...any) error {
	return fmt.Errorf("raft: invariant broken: "+format, args...)
}
