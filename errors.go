package raft

import (
	"errors"
	"fmt"
	"strings"
)

// Rejections: the proposal was not appended and will never commit. It may be
// proposed again.
var (
	// ErrNoLeader: no leader took the proposal, or answered the read, before the
	// context ended: this node knew of none, could not reach it, or the leader was
	// busy. The text says which this node saw. Nothing was done: try again, with a
	// context that ends later or at another node.
	ErrNoLeader = errors.New("raft: no leader took this attempt in time; it had no effect, try again")
	// ErrOverloaded: this node's queue of proposals (Config.MaxQueueBytes) is full.
	// Submit says so at once, Propose when its context ends before there is room.
	// Propose less, or later.
	ErrOverloaded = errors.New("raft: overloaded: the proposal queue is full, try again later")
	// ErrDiskFull: the disk of this node or of the leader is full, or the disks of
	// so many others that nothing could be committed. Free some space there: the
	// cluster then goes on by itself. Status tells which nodes are meant.
	ErrDiskFull = errors.New("raft: disk full: this node, the leader or a majority has no space for more entries; free some, nothing needs to be restarted")
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

var errMetaNotStored = errors.New("raft: ApplyOnDisk has not called meta: it must make the changes that meta returns, in the same transaction")

var errRestored = errors.New("raft: the node was restored from another node's snapshot, which may include the command")

func outcomeUnknown(cause error) error { return &unknownError{cause} }

type unknownError struct{ cause error }

func (e *unknownError) Error() string {
	return "raft: outcome unknown: the command may have been committed or may be later: " + e.cause.Error()
}
func (e *unknownError) Is(target error) bool { return target == ErrOutcomeUnknown }
func (e *unknownError) Unwrap() error        { return e.cause }

// ErrSessionExpired is matched by every *SessionError which says that the
// session is not open: it expired, was ended or closed, or never was.
var ErrSessionExpired = errors.New("raft: session is not open any more")

// SessionReason says why a request of a session was not executed.
type SessionReason byte

const (
	// SessionUnknown: there is no such session, and it is not remembered that there was.
	SessionUnknown SessionReason = iota
	// SessionExpired: it was not used for longer than Config.SessionTimeout.
	SessionExpired
	// SessionDisplaced: it made room for others (Config.MaxSessions, Config.MaxSessionsBytes).
	SessionDisplaced
	// SessionOverrun: a request was Config.MaxSessionRequests or more above DoneBelow.
	SessionOverrun
	// SessionClosed: CloseSession was called.
	SessionClosed
	// SessionSequence: the request has a Seq of 0 or below DoneBelow. The session goes on.
	SessionSequence
	// SessionWindow: the request is too far above its DoneBelow; this node did
	// not send it on, and the session goes on.
	SessionWindow
)

var sessionReasons = [...]string{
	SessionUnknown:   "it was never opened in this cluster, or ended so long ago that this is not remembered",
	SessionExpired:   "it was not used for longer than Config.SessionTimeout",
	SessionDisplaced: "it was ended to make room for others: Config.MaxSessions or Config.MaxSessionsBytes was reached",
	SessionOverrun:   "it was ended because one of its requests was Config.MaxSessionRequests or more above DoneBelow",
	SessionClosed:    "it was closed",
	SessionSequence:  "requests are numbered from 1 on, and the client has said that it has the answers to all below DoneBelow: their results are gone",
	SessionWindow:    "it is Config.MaxSessionRequests or more above its DoneBelow: wait for answers and raise DoneBelow",
}

// SessionError says that a request of a session was not executed. If it was
// sent before, it may have been executed then.
type SessionError struct {
	Reason         SessionReason
	Session        SessionID
	Seq, DoneBelow uint64 // of the request, with SessionSequence and SessionWindow; the DoneBelow is the highest that was said
}

func (e *SessionError) Error() string {
	if !e.over() {
		return fmt.Sprintf("raft: request %d of session %d, DoneBelow %d, not executed: %s", e.Seq, e.Session, e.DoneBelow, sessionReasons[e.Reason])
	}
	return fmt.Sprintf("raft: session %d is not open: %s; this request was not executed; what became of earlier ones without an answer stays unknown: find out by reading, and open another session",
		e.Session, sessionReasons[e.Reason])
}

// over tells whether the session is not open.
func (e *SessionError) over() bool { return e.Reason <= SessionClosed }

// Is makes errors that say the session is not open match ErrSessionExpired.
func (e *SessionError) Is(target error) bool { return target == ErrSessionExpired && e.over() }

// ResultSizeError says that a request of a session was executed, once, as entry
// Index, and that its result is not kept because it has more bytes than
// Config.MaxResultBytes. Whoever sends the request again is told the same.
type ResultSizeError struct {
	Index Index
	Size  uint64 // of the result, in bytes
}

func (e *ResultSizeError) Error() string {
	return fmt.Sprintf("raft: the request was executed once, as entry %d, but its result of %d bytes is over Config.MaxResultBytes and was not kept: read the state machine instead, and have commands of sessions return less", e.Index, e.Size)
}

// StillRunningError is returned by Close when a call into the state machine or
// the disk does not return. Everything else is stopped. That call's goroutine
// ends with the call; Done is closed then, and a further Close waits again.
type StillRunningError struct {
	Apply    Index // of the entry whose Apply runs, 0 if none does
	Flush    bool  // a write or fsync of the log runs
	Snapshot bool  // a Capture's WriteTo or Close, a write of a snapshot file, or a Backup runs
}

func (e *StillRunningError) Error() string {
	var running []string
	if e.Apply != 0 {
		running = append(running, fmt.Sprintf("Apply of entry %d", e.Apply))
	}
	if e.Flush {
		running = append(running, "a write or fsync of the log")
	}
	if e.Snapshot {
		running = append(running, "a Capture's WriteTo or Close, the writing of a snapshot's file, or a Backup")
	}
	if running == nil {
		running = append(running, "a read of the log, a dial of Config.DialContext or a call of Config.Logger")
	}
	return fmt.Sprintf("raft: closed, but what runs has not returned: %s; call Close again to wait", strings.Join(running, "; "))
}

// ApplyError is why a node that still replicates and votes applies nothing any
// more: the state machine panicked, or its ApplyOnDisk failed. The entry is
// never skipped.
type ApplyError struct {
	Index Index
	Value any    // what panic was called with, or the error that was returned
	Stack string // of the panic; not part of Error, which is one line
}

func (e *ApplyError) Error() string {
	value, _, _ := strings.Cut(fmt.Sprintf("%v", e.Value), "\n")
	what := "panicked"
	if e.Stack == "" {
		what = "failed"
	}
	return fmt.Sprintf("raft: state machine %s applying entry %d: %s; fix it and restart the node", what, e.Index, value)
}

// Unwrap returns what the state machine returned, or panicked with, if that is
// an error.
func (e *ApplyError) Unwrap() error {
	err, _ := e.Value.(error)
	return err
}

// SnapshotError says that the state machine could not take or take over a
// snapshot. After a failed Restore the node applies nothing any more, but
// replicates and votes; after the others it goes on and tries again later.
type SnapshotError struct {
	Op    string // "Snapshot", "WriteTo" or "Restore", the call that failed
	Index Index  // of the last entry that the snapshot includes
	Err   error  // what it returned, or the panic
	Stack string // of a panic
}

func (e *SnapshotError) Error() string {
	do := "the log is kept, and the next one is tried later"
	if e.Op == "Restore" {
		do = "fix it and restart the node"
	}
	return fmt.Sprintf("raft: state machine's %s of a snapshot up to entry %d failed: %v; %s", e.Op, e.Index, e.Err, do)
}

// Unwrap returns what the state machine returned.
func (e *SnapshotError) Unwrap() error { return e.Err }

// StateMachineError refuses a state machine on disk that includes an entry which
// the log does not have: one of them is another node's, or was set back.
type StateMachineError struct {
	State EntryID // the last entry that the state includes
	Log   EntryID // the last entry of the log
}

func (e *StateMachineError) Error() string {
	return fmt.Sprintf("raft: the state machine includes entry %d of term %d, and the log, which ends with entry %d of term %d, does not: use the database and the data directory that belong together, or remove this node from the cluster and add it again with both empty; nothing was changed",
		e.State.Index, e.State.Term, e.Log.Index, e.Log.Term)
}

// MetaError refuses what a state machine on disk has kept for the library (see
// OnDisk). Nothing was changed.
type MetaError struct {
	Key   []byte // where the table is wrong; nil if it is as a whole
	Found string // what is wrong
	Do    string // what to do
}

func (e *MetaError) Error() string {
	where := ""
	if e.Key != nil {
		where = fmt.Sprintf(" at key %x", e.Key)
	}
	return fmt.Sprintf("raft: the state machine's LoadMeta gave a table that can't be used%s: %s; %s", where, e.Found, e.Do)
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

// InUseError refuses a data directory that a running node uses, of this process
// or of another one.
type InUseError struct {
	Dir string
	Err error // what the lock said
}

func (e *InUseError) Error() string {
	return fmt.Sprintf("raft: data directory %s is in use by another node; stop that one first, or name another directory: %v", e.Dir, e.Err)
}

// Unwrap returns what the lock said.
func (e *InUseError) Unwrap() error { return e.Err }

// MembershipReason says why a change of the membership was refused.
type MembershipReason byte

const (
	// MembershipNotLeader: only the leader changes the membership; ask it.
	MembershipNotLeader MembershipReason = iota + 1
	// MembershipTooEarly: the leader has committed nothing in its term yet, or goes
	// on with another cluster's log and has no snapshot of its own yet; try again.
	MembershipTooEarly
	// MembershipPending: another change is being committed; wait for it.
	MembershipPending
	// MembershipNoVoters: nobody would be left to decide anything.
	MembershipNoVoters
	// MembershipQuorum: too few of the voters to be answer now.
	MembershipQuorum
	// MembershipTooMany: a cluster has at most 128 members.
	MembershipTooMany
	// MembershipExists: the node is a member already.
	MembershipExists
	// MembershipUnknown: the node is not a member.
	MembershipUnknown
	// MembershipBad: the member has no ID, one that is listed twice, or no address of the form host:port.
	MembershipBad
	// MembershipSameAddr: two members have one address.
	MembershipSameAddr
	// MembershipReplaced: a later change took this one back before it was finished.
	MembershipReplaced
)

var membershipReasons = [...]string{
	MembershipNotLeader: "this node does not lead; ask the leader",
	MembershipTooEarly:  "the leader has committed nothing in its term yet, or was just recovered and has no snapshot yet; try again",
	MembershipPending:   "another change is being committed; wait for it and try again",
	MembershipNoVoters:  "no voter would be left; add one first",
	MembershipQuorum:    "a majority of the voters to be does not answer; bring them back first, or the cluster would stop",
	MembershipTooMany:   "a cluster has at most 128 members",
	MembershipExists:    "the node is a member already; remove it first, or change its address with ChangeMembers",
	MembershipUnknown:   "the node is not a member; Status lists them",
	MembershipBad:       "a member needs an ID of 1 to 255 bytes that is listed once, and an address of the form host:port with a host and a port",
	MembershipSameAddr:  "another member has its address; give each node its own",
	MembershipReplaced:  "a later change took this one back before it was finished; Status lists the members",
}

// MembershipError refuses a change of the membership. Nothing was changed.
type MembershipError struct {
	Reason MembershipReason
	Node   NodeID // whom it is about, if anybody
	Leader NodeID // with MembershipNotLeader: whom to ask, if known
}

func (e *MembershipError) Error() string {
	s := "raft: membership not changed: " + membershipReasons[e.Reason]
	if e.Node != "" {
		s += fmt.Sprintf(" (node %q)", e.Node)
	}
	if e.Leader != "" && e.Reason == MembershipNotLeader {
		s += fmt.Sprintf(" (%q)", e.Leader)
	}
	return s
}

// LaggingError is why a change of the membership is not finished: a node that is
// to become a voter has not caught up. It becomes one as soon as it has, whoever
// leads then. The error matches ErrOutcomeUnknown and the context's error.
type LaggingError struct {
	Node        NodeID
	Match, Last Index // the newest entry that it has, as far as the leader knows, and the leader's
	Unreached   error // why the leader could not connect to it when it last tried; nil if it could
	Err         error // why the wait ended
}

func (e *LaggingError) Error() string {
	unreached := ""
	if e.Unreached != nil {
		unreached = fmt.Sprintf(" (when the leader last tried to connect to it: %v)", e.Unreached)
	}
	return fmt.Sprintf("raft: node %q has not caught up: it has entry %d of %d, and becomes a voter when it has all%s; wait for it, check that it runs and that its address leads to it, or take the change back with Remove: %v",
		e.Node, e.Match, e.Last, unreached, e.Err)
}

// Unwrap returns why the wait ended.
func (e *LaggingError) Unwrap() error { return e.Err }

// TransferReason says why leadership was not handed over.
type TransferReason byte

const (
	// TransferNotLeader: only the leader can hand leadership over.
	TransferNotLeader TransferReason = iota + 1
	// TransferPending: another transfer is on.
	TransferPending
	// TransferNobody: no other voter answers, or only some whose disks are full.
	TransferNobody
	// TransferNotVoter: the node is a learner, is leaving, or is no member.
	TransferNotVoter
	// TransferUnreachable: the node has not answered for an election timeout.
	TransferUnreachable
	// TransferDiskFull: the node's disk is full.
	TransferDiskFull
	// TransferTimeout: the node did not take over within an election timeout; the old leader goes on.
	TransferTimeout
)

var transferReasons = [...]string{
	TransferNotLeader:   "this node does not lead; ask the leader",
	TransferPending:     "another transfer is on; wait for it",
	TransferNobody:      "no other voter answers and has space on its disk",
	TransferNotVoter:    "the node is not a voter; Status lists them",
	TransferUnreachable: "the node does not answer; choose another",
	TransferDiskFull:    "the node's disk is full; choose another, or free some space there",
	TransferTimeout:     "the node did not take over in time; this one still leads, try again",
}

// TransferError says why leadership was not handed over.
type TransferError struct {
	Reason TransferReason
	Node   NodeID // the target, or the leader with TransferNotLeader; may be empty
}

func (e *TransferError) Error() string {
	s := "raft: leadership not transferred: " + transferReasons[e.Reason]
	if e.Node != "" {
		s += fmt.Sprintf(" (node %q)", e.Node)
	}
	return s
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
