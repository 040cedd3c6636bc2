package raft

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"time"
)

// StateMachine is what a service keeps identical on all nodes. Its methods are
// called one at a time, perhaps before Start returns, never after Close has
// returned nil. A service that reads its state meanwhile guards it by a lock of
// its own (see the example of Server.ReadIndex). The same entries must have the same effect on every node: use
// Entry.Time for time, and neither map order nor randomness.
type StateMachine interface {
	// Apply takes a committed command and returns its result, which goes to
	// the proposer. A command that the service refuses has a result too. A
	// panic stops applying on this node (see ApplyError).
	Apply(Entry) []byte
	// Snapshot captures the state as it is now, fast: nothing is applied
	// meanwhile. Writing it goes on while entries are applied. An error or a
	// panic is reported, and a later attempt made.
	Snapshot() (Capture, error)
	// Restore replaces the whole state by what a Capture wrote, on this node or
	// another one. Every byte was verified before it is read. After an error or
	// a panic this node applies nothing more (see SnapshotError).
	Restore(r io.Reader) error
}

// Capture is a state at one moment, to be written. WriteTo runs on a goroutine
// of its own and ends early, with ctx's error, when ctx ends. Close is called
// once, also when WriteTo was not or has failed.
type Capture interface {
	WriteTo(ctx context.Context, w io.Writer) error
	Close()
}

// CaptureBytes is a Capture of a small state, which was copied whole.
type CaptureBytes []byte

// WriteTo writes the bytes.
func (b CaptureBytes) WriteTo(_ context.Context, w io.Writer) error {
	_, err := w.Write(b)
	return err
}

// Close does nothing.
func (CaptureBytes) Close() {}

// CaptureFunc is a Capture that needs no Close.
type CaptureFunc func(ctx context.Context, w io.Writer) error

// WriteTo calls f.
func (f CaptureFunc) WriteTo(ctx context.Context, w io.Writer) error { return f(ctx, w) }

// Close does nothing.
func (CaptureFunc) Close() {}

// BatchApplier may be implemented by a StateMachine beside Apply. It is then
// called instead, with one result to be set per entry.
type BatchApplier interface {
	ApplyBatch(entries []Entry, results [][]byte)
}

// OnDisk may be implemented by a StateMachine that keeps its state in a database
// of its own, so that a restart need neither restore a snapshot nor apply the
// log again. Its methods are then called in place of Apply and Restore.
//
// The database also keeps a table for the library, apart from the state: it says
// what the state includes, and has the sessions of clients with the results that
// they keep. So it must change in the same transaction as the state: after a
// crash both are as they were, or both as they are now. Transactions may be made
// durable later, if they are in order. Entries come only when the log on this
// node's disk has them.
//
// Keys and values of the table are opaque. A key has 1 to 17 bytes, a value at
// least one; beside results, which have at most Config.MaxResultBytes, values are
// short. A transaction changes what its entries have changed: some 40 bytes, and
// with a session's request some 100 more and its result.
type OnDisk interface {
	// LoadMeta calls each for every key of the table and the value that the newest
	// transaction that survived left there, in any order; not at all with an empty
	// database. It returns the error that each returns. each keeps neither slice.
	// Start calls it once.
	LoadMeta(each func(key, value []byte) error) error
	// ApplyOnDisk executes the entries, sets one result per entry, and then calls
	// meta and makes the changes that it returns in the table. Called again, meta
	// returns the same. After an error or a panic nothing more is applied on this
	// node.
	ApplyOnDisk(entries []Entry, results [][]byte, meta func() []MetaChange) error
	// RestoreOnDisk replaces the whole state by what a Capture wrote, and the whole
	// table by meta, which removes nothing: no key that was there before stays,
	// and none that the Capture may have brought along.
	RestoreOnDisk(r io.Reader, meta []MetaChange) error
}

// MetaChange sets one key of the library's table in a database, or removes it if
// Value is nil.
type MetaChange struct{ Key, Value []byte }

// Config describes a node. ID, ClusterID, StateMachine and one of Dir and
// Storage are required; zero values elsewhere mean the default.
type Config struct {
	ID           NodeID
	ClusterID    string // alike on all nodes; keeps clusters apart that share a network
	StateMachine StateMachine

	Dir      string  // data directory of this node alone; made if missing
	Storage  Storage // instead of Dir, for example NewMemoryStorage()
	AdoptDir bool    // accept a Dir that was copied or restored here; the original must never run again

	// Bootstrap lists the founders, alike on each. It is used once, to form the
	// cluster; a node that holds a log ignores it.
	Bootstrap []Member

	Listen      string       // host:port; default: this node's Addr in Bootstrap, else a free port of 127.0.0.1
	Listener    net.Listener // instead of Listen; closed by Close, and by a failing Start
	DialContext func(ctx context.Context, network, addr string) (net.Conn, error)
	TLS         *tls.Config // for both directions; nil: plain

	HeartbeatInterval  time.Duration // default 100ms
	ElectionTimeout    time.Duration // T, default 1s; deadlines are drawn from [T, 2T)
	DisablePreVote     bool
	DisableCheckQuorum bool // needs DisablePreVote too

	// LeaseDuration is for how long a leader asks its followers to vote for nobody
	// else, with each heartbeat, so that ReadLease need not ask anybody. Zero, the
	// default, is no lease; otherwise at least two heartbeats and at most
	// ElectionTimeout, and one minute. A follower promises whatever its leader asks
	// for, and keeps that also after a restart, which begins with its last one or
	// a longer one. Linux only: elsewhere a leader does not see that the
	// machine has slept. It needs check-quorum.
	LeaseDuration time.Duration
	// MaxClockDriftPercent is by how much the clock of one node may run faster than
	// that of another during a lease; default 5. ReadLease is wrong if they differ
	// by more, nothing else is.
	MaxClockDriftPercent int

	MaxCommandBytes     int // of one command; default 1 MiB, at most 64 MiB
	MaxQueueBytes       int // of proposals that wait to be appended or forwarded; default 64 MiB
	MaxUncommittedBytes int // of entries that a leader has appended and that are not committed, or not on its own disk; default 64 MiB
	MaxFrameBytes       int // of entries in one append, unless a single one is larger; default 1 MiB
	MaxInflightAppends  int // unanswered appends to one follower; default 16
	MaxInflightBytes    int // bytes in them; default 8 MiB
	MaxLogMemoryBytes   int // of entries held in memory; default 8 MiB. What is not applied, or not confirmed by a follower that keeps up, stays beyond that, up to MaxUncommittedBytes
	MaxSegmentBytes     int // of one file of the log; default 64 MiB, at least 1 MiB

	SnapshotEveryBytes        int // of commands applied since the last snapshot, until the next is taken; default 64 MiB; negative: never by bytes
	SnapshotEveryEntries      int // the same in entries; default 1,000,000; negative: never by entries
	KeepLogBytes              int // of the log are kept behind a snapshot, for followers that are a little behind; default 64 MiB
	MaxSnapshotBytesPerSecond int // sent to one follower; default 64 MiB

	// Bounds of client sessions (see Server.OpenSession), alike on all nodes: those
	// of the node on which the newest session was opened hold for all sessions.
	SessionTimeout     time.Duration // without a request, by the leaders' clocks, after which a session ends; default 1h
	MaxSessions        int           // default 10,000; beyond, the one used longest ago ends
	MaxSessionRequests int           // how far a session's Seq may be above DoneBelow; default 1024
	MaxResultBytes     int           // of one result that a session keeps; default 64 KiB
	MaxSessionsBytes   int           // of all results that are kept, and 64 for each of them and for each session; default 64 MiB; beyond, the session that keeps most ends

	Logger *slog.Logger // nil: slog.Default()

	versions       wireVersions  // of the wire; tests mix releases by it
	unstableTiming bool          // the harness runs timing that no service should
	closeGrace     time.Duration // how long Close waits for what it can't interrupt
	history        *history      // the harness's, nil elsewhere
	sleptFor       sleepClock    // tests let the machine sleep
}

const maxCommandBytesLimit = 64 << 20

// Validate returns nil, or one error that names every bad field.
func (c Config) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.Listener != nil && c.Listen != "" {
		bad("Listen and Listener: set at most one")
	}
	c = c.withDefaults()
	if c.ID == "" || len(c.ID) > 255 {
		bad("ID: want 1 to 255 bytes, a name that is unique in the cluster; have %d", len(c.ID))
	}
	if c.ClusterID == "" || len(c.ClusterID) > 255 {
		bad("ClusterID: want 1 to 255 bytes, the same on every node; have %d", len(c.ClusterID))
	}
	if c.StateMachine == nil {
		bad("StateMachine: nil; it receives the committed commands")
	}
	if (c.Dir == "") == (c.Storage == nil) {
		bad("Dir and Storage: set exactly one; for a node without a disk set Storage to NewMemoryStorage()")
	}
	c.validateBootstrap(bad)
	c.validateTiming(bad)
	for _, f := range []struct {
		name       string
		value, min int
		max        int
	}{
		{"MaxCommandBytes", c.MaxCommandBytes, 1, maxCommandBytesLimit},
		{"MaxQueueBytes", c.MaxQueueBytes, c.MaxCommandBytes, 1 << 30},
		{"MaxUncommittedBytes", c.MaxUncommittedBytes, 1, 1 << 30},
		{"MaxFrameBytes", c.MaxFrameBytes, 1, 64 << 20},
		{"MaxInflightAppends", c.MaxInflightAppends, 1, 1024},
		{"MaxInflightBytes", c.MaxInflightBytes, 1, 1 << 30},
		{"MaxLogMemoryBytes", c.MaxLogMemoryBytes, 1, 1 << 40},
		{"SnapshotEveryBytes", c.SnapshotEveryBytes, -1, 1 << 40},
		{"SnapshotEveryEntries", c.SnapshotEveryEntries, -1, 1 << 40},
		{"KeepLogBytes", c.KeepLogBytes, 1, 1 << 40},
		{"MaxSnapshotBytesPerSecond", c.MaxSnapshotBytesPerSecond, 1 << 10, 1 << 40},
		{"MaxSegmentBytes", c.MaxSegmentBytes, 1 << 20, 1 << 30},
		{"MaxClockDriftPercent", c.MaxClockDriftPercent, 1, 100},
		{"MaxSessions", c.MaxSessions, 1, 1 << 24},
		{"MaxSessionRequests", c.MaxSessionRequests, 1, 1 << 24},
		{"MaxResultBytes", c.MaxResultBytes, 1, 1 << 30},
		{"MaxSessionsBytes", c.MaxSessionsBytes, c.MaxResultBytes + sessionCost + resultCost, 1 << 30},
	} {
		if f.value < f.min || f.value > f.max {
			bad("%s: %d is outside %d to %d", f.name, f.value, f.min, f.max)
		}
	}
	if len(errs) == 0 {
		return nil
	}
	return fmt.Errorf("raft: bad Config:\n%w", errors.Join(errs...))
}

func (c *Config) validateBootstrap(bad func(string, ...any)) {
	if len(c.Bootstrap) == 0 {
		return
	}
	ids, addrs := map[NodeID]bool{}, map[string]bool{}
	for i, m := range c.Bootstrap {
		if m.ID == "" || len(m.ID) > 255 {
			bad("Bootstrap[%d].ID: want 1 to 255 bytes, have %d", i, len(m.ID))
		}
		if ids[m.ID] {
			bad("Bootstrap[%d].ID: %q is listed twice", i, m.ID)
		}
		if _, _, err := net.SplitHostPort(m.Addr); err != nil {
			bad("Bootstrap[%d].Addr: %q is not host:port", i, m.Addr)
		} else if addrs[m.Addr] {
			bad("Bootstrap[%d].Addr: %q is listed twice", i, m.Addr)
		}
		if m.Learner {
			bad("Bootstrap[%d].Learner: a founder is a voter", i)
		}
		ids[m.ID], addrs[m.Addr] = true, true
	}
	if len(c.Bootstrap) > 64 {
		bad("Bootstrap: %d founders, at most 64", len(c.Bootstrap))
	}
	if !ids[c.ID] {
		bad("Bootstrap: this node, %q, is not in it; a node that joins later has an empty Bootstrap", c.ID)
	}
}

func (c *Config) validateTiming(bad func(string, ...any)) {
	if c.HeartbeatInterval < time.Millisecond {
		bad("HeartbeatInterval: %v is below 1ms", c.HeartbeatInterval)
	}
	if c.ElectionTimeout < time.Millisecond {
		bad("ElectionTimeout: %v is below 1ms", c.ElectionTimeout)
	}
	if !c.unstableTiming && c.ElectionTimeout < 3*c.HeartbeatInterval {
		bad("ElectionTimeout: %v is below three times HeartbeatInterval (%v): one late heartbeat would depose a healthy leader, and leaders would churn", c.ElectionTimeout, c.HeartbeatInterval)
	}
	if c.SessionTimeout < time.Second {
		bad("SessionTimeout: %v is below 1s; clients send a request at least that often, or lose their session", c.SessionTimeout)
	}
	if c.DisableCheckQuorum && !c.DisablePreVote {
		bad("DisableCheckQuorum: needs DisablePreVote too: with pre-votes alone, a leader that can send but not receive would stay for ever")
	}
	if c.LeaseDuration == 0 {
		return
	}
	if lo, hi := 2*c.HeartbeatInterval, min(c.ElectionTimeout, maxLeasePromise); c.LeaseDuration < lo || c.LeaseDuration > hi {
		bad("LeaseDuration: %v is outside %v to %v: a shorter one would end between two heartbeats, a longer one would hold up elections", c.LeaseDuration, lo, hi)
	}
	if c.DisableCheckQuorum {
		bad("LeaseDuration: needs check-quorum: a leader that can send but not receive would be promised for ever that nobody else is elected")
	}
	if _, err := c.sleptFor(); err != nil {
		bad("LeaseDuration: %w; leave it zero on this machine: ReadIndex needs no clock", err)
	}
}

func (c Config) withDefaults() Config {
	setDefault(&c.HeartbeatInterval, 100*time.Millisecond)
	setDefault(&c.ElectionTimeout, time.Second)
	setDefault(&c.MaxClockDriftPercent, 5)
	setDefault(&c.MaxCommandBytes, 1<<20)
	setDefault(&c.MaxQueueBytes, 64<<20)
	setDefault(&c.MaxUncommittedBytes, 64<<20)
	setDefault(&c.MaxFrameBytes, 1<<20)
	setDefault(&c.MaxInflightAppends, 16)
	setDefault(&c.MaxInflightBytes, 8<<20)
	setDefault(&c.MaxLogMemoryBytes, 8<<20)
	setDefault(&c.MaxSegmentBytes, 64<<20)
	setDefault(&c.SnapshotEveryBytes, 64<<20)
	setDefault(&c.SnapshotEveryEntries, 1_000_000)
	setDefault(&c.KeepLogBytes, 64<<20)
	setDefault(&c.MaxSnapshotBytesPerSecond, 64<<20)
	setDefault(&c.SessionTimeout, time.Hour)
	setDefault(&c.MaxSessions, 10_000)
	setDefault(&c.MaxSessionRequests, 1024)
	setDefault(&c.MaxResultBytes, 64<<10)
	setDefault(&c.MaxSessionsBytes, 64<<20)
	setDefault(&c.closeGrace, 1500*time.Millisecond)
	setDefault(&c.versions, wireVersions{minWireVersion, maxWireVersion})
	if c.sleptFor == nil {
		c.sleptFor = sleptFor
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	if c.DialContext == nil {
		c.DialContext = (&net.Dialer{}).DialContext
	}
	if c.Listen == "" {
		c.Listen = "127.0.0.1:0"
		for _, m := range c.Bootstrap {
			if m.ID == c.ID {
				c.Listen = m.Addr
			}
		}
	}
	return c
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

func (c *Config) sessionLimits() sessionLimits {
	return sessionLimits{
		timeout: uint64(c.SessionTimeout), sessions: uint64(c.MaxSessions), requests: uint64(c.MaxSessionRequests),
		resultBytes: uint64(c.MaxResultBytes), totalBytes: uint64(c.MaxSessionsBytes),
	}
}

func (c *Config) limits() limits {
	return limits{
		electionTimeout:    c.ElectionTimeout,
		heartbeatInterval:  c.HeartbeatInterval,
		preVote:            !c.DisablePreVote,
		checkQuorum:        !c.DisableCheckQuorum,
		gatherBytes:        min(64<<10, c.MaxFrameBytes),
		maxFrameBytes:      c.MaxFrameBytes,
		maxInflight:        c.MaxInflightAppends,
		maxInflightBytes:   c.MaxInflightBytes,
		maxTailBytes:       c.MaxLogMemoryBytes,
		maxUncommittedSize: c.MaxUncommittedBytes,
		leasePromise:       c.LeaseDuration,
		lease:              leaseWithin(c.LeaseDuration, c.MaxClockDriftPercent),
	}
}
