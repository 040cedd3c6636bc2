// Package memnet is a network in memory: listeners, dialers and connections
// with the interfaces of package net, and verbs that break them as real
// networks break.
//
// It behaves like TCP between named hosts. Bytes on one connection keep their
// order, whatever the delays; a pulled cable holds bytes and delivers them when
// it is back; a reset loses them; no connection ever has a hole in its stream.
//
// It works outside and inside a bubble of testing/synctest. In a bubble delays
// and deadlines are virtual time, and three properties matter. A blocked Read,
// Accept or dial holds no lock and waits on channels and timers only, so it is
// durably blocked. A Write never blocks, because net/rpc holds a mutex across
// its writes, and a goroutine that waits for a mutex is not durably blocked.
// And the package starts no goroutine: a reader computes when the next bytes
// arrive and waits for that itself. A Network must be made by New in the bubble
// that uses it, since channels belong to the bubble that made them.
//
// All methods of all types may be called from any goroutine at any time.
package memnet

import (
	"hash/fnv"
	"math"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"time"
)

// DefaultWriteCap is how many bytes one direction of a connection accepts
// ahead of its reader, until SetWriteCap says otherwise.
const DefaultWriteCap = 64 << 20

// backlog is how many connections wait for Accept before further dials wait
// too; it is the value that Linux gives a listener that does not ask.
const backlog = 128

// OnCut says what becomes of the connections that cross a cut link.
type OnCut int

const (
	// HoldOnCut holds what is written during the cut and delivers it when the
	// link is back, as TCP's retransmission does. It is the default.
	HoldOnCut OnCut = iota
	// ResetOnCut resets both ends the moment the link is cut.
	ResetOnCut
	// ResetOnHeal holds bytes during the cut and resets both ends when the link
	// is back, as a firewall that has forgotten the connection does.
	ResetOnHeal
)

// Verdict is a filter's decision about one Write.
type Verdict int

const (
	// Pass lets the bytes through.
	Pass Verdict = iota
	// Drop swallows this write and, since a TCP stream has no holes, everything
	// that follows in this direction of this connection, the end of the stream
	// included. The writer is not told; swallowed bytes count towards the cap.
	Drop
	// Break resets the connection; the write fails.
	Break
)

// Network is a set of hosts that can reach each other except where a verb says
// otherwise. A host exists by being named.
type Network struct {
	seed uint64
	done chan struct{} // closed by Close

	mu          sync.Mutex // guards everything below and in conns; never held while waiting
	closed      bool
	links       map[linkKey]*link
	groups      map[string][]int // the partition: the groups of each named host; nil when there is none
	listeners   map[Addr]*listener
	conns       []*conn // ends not closed by their owner, oldest first so that dice are drawn in a fixed order
	nextPort    int
	writeCap    int
	dialTimeout time.Duration
	onCut       OnCut
	changed     chan struct{} // closed when a waiting dial should look again; nil while none waits
}

type linkKey struct{ from, to string }

// link is one direction between two hosts.
type link struct {
	key     linkKey
	verb    linkVerb
	stalled bool
	delay   func(*rand.Rand) time.Duration
	dice    *rand.Rand

	filter   func(p []byte) Verdict
	filterMu sync.Mutex // makes filter calls of this link one at a time; taken before Network.mu, never after
}

// linkVerb is what was last said about one link; it overrides the partition.
type linkVerb int8

const (
	asPartitioned linkVerb = iota
	cutByVerb
	joinedByVerb
)

// New returns a network whose delays draw their dice from seed. Each link has
// dice of its own, so traffic on one does not disturb another's sequence.
func New(seed uint64) *Network {
	return &Network{
		seed:      seed,
		done:      make(chan struct{}),
		links:     make(map[linkKey]*link),
		listeners: make(map[Addr]*listener),
		nextPort:  49152,
		writeCap:  DefaultWriteCap,
	}
}

// SetWriteCap sets how many bytes one direction of a connection accepts ahead
// of its reader. A write that would exceed it accepts nothing and fails like a
// write whose deadline passed.
func (n *Network) SetWriteCap(bytes int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.writeCap = bytes
}

// SetDialTimeout bounds how long a dial waits for a link that is cut or for a
// listener that does not accept. Zero, the default, leaves that to the dial's
// context. Dials that already wait keep the bound they began with.
func (n *Network) SetDialTimeout(d time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.dialTimeout = d
}

// SetOnCut sets what later cuts and heals do to the connections that cross them.
func (n *Network) SetOnCut(o OnCut) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.onCut = o
}

// Cut pulls the cable between a and b. Nothing arrives any more in either
// direction, writes are accepted up to the cap, and dials wait. What had
// arrived before and was not yet read can still be read. See OnCut for what
// follows.
func (n *Network) Cut(a, b string) {
	n.change(func() { n.link(a, b).verb, n.link(b, a).verb = cutByVerb, cutByVerb })
}

// CutOneWay cuts the direction from one host to another and leaves the reverse
// direction as it is. A dial needs both directions.
func (n *Network) CutOneWay(from, to string) {
	n.change(func() { n.link(from, to).verb = cutByVerb })
}

// Join undoes a cut between a and b in both directions, and also connects the
// two when Partition has separated them.
func (n *Network) Join(a, b string) {
	n.change(func() { n.link(a, b).verb, n.link(b, a).verb = joinedByVerb, joinedByVerb })
}

// Partition replaces all earlier cuts, joins and partitions by this one: two
// hosts reach each other if a group names both, or if no group names either. A
// host in several groups is a bridge between them. Cut, CutOneWay and Join
// change single links afterwards.
func (n *Network) Partition(groups ...[]string) {
	n.change(func() {
		n.forgetCuts()
		n.groups = make(map[string][]int)
		for i, group := range groups {
			for _, host := range group {
				n.groups[host] = append(n.groups[host], i)
			}
		}
	})
}

// Heal undoes every Cut, CutOneWay, Join and Partition. Stalls, delays and
// filters stay.
func (n *Network) Heal() {
	n.change(n.forgetCuts)
}

// Stall makes to seem hung for from: connections are accepted and bytes are
// taken and held, as by a peer whose process is stopped. Unstall delivers them.
func (n *Network) Stall(from, to string) {
	n.change(func() { n.link(from, to).stalled = true })
}

// Unstall undoes Stall.
func (n *Network) Unstall(from, to string) {
	n.change(func() { n.link(from, to).stalled = false })
}

// SetDelay makes each later write from one host to another arrive after the
// delay that f draws, or together with the write before it when that arrives
// later. The end of a stream is delayed like a write, a dial by one draw for
// each direction. A nil f and a draw below zero mean no delay. f is called with
// the network locked: it must not call the network. See Constant and HeavyTail.
func (n *Network) SetDelay(from, to string, f func(*rand.Rand) time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.link(from, to).delay = f
}

// SetFilter asks f about each later non-empty Write from one host to another;
// nil asks nobody. Calls for one link come one at a time, and f may call the
// network's verbs, but must not wait, write to a connection, or keep or change p.
func (n *Network) SetFilter(from, to string, f func(p []byte) Verdict) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.link(from, to).filter = f
}

// Break resets every connection between a and b at once, cut or not: both ends
// fail with a connection reset, and what was not yet read is lost.
func (n *Network) Break(a, b string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.resetBetween(a, b)
}

// Open returns how many listeners and ends of connections have not been closed
// by their owners. A reset connection counts until it is closed, as a file
// descriptor would; one that waits for Accept counts too.
func (n *Network) Open() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.listeners) + len(n.conns)
}

// Close closes every listener and every end of every connection, and ends
// waiting dials. Later calls of Listen and of dialers fail with net.ErrClosed.
func (n *Network) Close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return
	}
	n.closed = true
	close(n.done)
	for _, l := range n.listeners {
		l.close()
	}
	for _, c := range slices.Clone(n.conns) {
		c.close()
	}
}

// Constant returns a delay that is always d.
func Constant(d time.Duration) func(*rand.Rand) time.Duration {
	return func(*rand.Rand) time.Duration { return d }
}

// HeavyTail returns delays of at least floor and at most ceiling with a Pareto
// distribution of shape 1.2: half of them are below 1.8 times floor, and one in
// a hundred exceeds 46 times floor.
func HeavyTail(floor, ceiling time.Duration) func(*rand.Rand) time.Duration {
	const shape = 1.2
	return func(r *rand.Rand) time.Duration {
		d := float64(floor) * math.Pow(1-r.Float64(), -1/shape)
		return time.Duration(min(d, float64(ceiling)))
	}
}

// link returns the state of one direction between two hosts.
func (n *Network) link(from, to string) *link {
	key := linkKey{from, to}
	l := n.links[key]
	if l == nil {
		h := fnv.New64a()
		h.Write([]byte(from + "\x00" + to))
		l = &link{key: key, dice: rand.New(rand.NewPCG(n.seed, h.Sum64()))}
		n.links[key] = l
	}
	return l
}

// draw returns the delay of the next write on l.
func (l *link) draw() time.Duration {
	if l.delay == nil {
		return 0
	}
	return max(0, l.delay(l.dice))
}

// cut reports whether nothing gets through on l because of a cut or partition.
func (n *Network) cut(l *link) bool {
	switch l.verb {
	case cutByVerb:
		return true
	case joinedByVerb:
		return false
	}
	from, to := n.groups[l.key.from], n.groups[l.key.to]
	if from == nil && to == nil {
		return false
	}
	return !slices.ContainsFunc(from, func(g int) bool { return slices.Contains(to, g) })
}

// passes reports whether bytes written on l now will arrive by themselves.
func (n *Network) passes(l *link) bool {
	return !l.stalled && !n.cut(l)
}

func (n *Network) forgetCuts() {
	n.groups = nil
	for _, l := range n.links {
		l.verb = asPartitioned
	}
}

// change applies f to the topology and does to the connections and the waiting
// dials what follows from it.
func (n *Network) change(f func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	before := make([]bool, len(n.conns)) // whether the way to conns[i] was cut
	for i, c := range n.conns {
		before[i] = n.cut(c.in.link)
	}
	f()
	for i, c := range n.conns {
		now := n.cut(c.in.link)
		if now && !before[i] && n.onCut == ResetOnCut || before[i] && !now && n.onCut == ResetOnHeal {
			c.resetBoth()
			continue
		}
		c.in.setBlocked(!n.passes(c.in.link))
	}
	n.wakeDials()
}

func (n *Network) resetBetween(a, b string) {
	for _, c := range n.conns {
		if k := c.in.link.key; k == (linkKey{a, b}) || k == (linkKey{b, a}) {
			c.resetBoth()
		}
	}
}

func (n *Network) wakeDials() {
	if n.changed != nil {
		close(n.changed)
		n.changed = nil
	}
}

// Addr is a host name and a port, as in "n0:1".
type Addr string

// Network returns "memnet".
func (Addr) Network() string { return "memnet" }

// String returns the address as Listen and dialers take it.
func (a Addr) String() string { return string(a) }

// Host returns the name that the network's verbs use.
func (a Addr) Host() string {
	host, _, err := net.SplitHostPort(string(a))
	if err != nil {
		return string(a)
	}
	return host
}
