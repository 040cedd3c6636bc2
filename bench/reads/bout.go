package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"example.com/raft"
	"example.com/raft/bench/cluster"
)

// bout is one case in one round.
type bout struct {
	reads  func(ctx context.Context, floor raft.Index) error
	writes func(ctx context.Context) (raft.Index, error) // nil: nobody writes

	counting, over atomic.Bool
	acknowledged   atomic.Uint64 // the highest index of a write
}

type sample struct {
	Case         string  `json:"case"`
	Round        int     `json:"round"`
	Procs        int     `json:"gomaxprocs"`
	PerSec       float64 `json:"reads_per_sec"`
	WritesPerSec float64 `json:"writes_per_sec"`
	P50          float64 `json:"p50_ms"`
	P99          float64 `json:"p99_ms"`
	CPUMicros    float64 `json:"cpu_us_per_read"` // of the whole process, writes included
	Allocs       float64 `json:"allocs_per_read"` // the same
}

// readsOf returns what the clients of a case do.
func readsOf(c *cluster.Cluster, leader int, how, rest string) (func(context.Context, raft.Index) error, func(context.Context) (raft.Index, error)) {
	where, beside, _ := strings.Cut(rest, "/")
	node := leader
	if where == "follower" {
		node = (leader + 1) % cluster.Size
	}
	ask := c.Servers[node].ReadIndex
	if how == "lease" {
		ask = c.Servers[node].ReadLease
	}
	read := checked(ask, c.Machines[node])
	if beside == "alone" {
		return read, nil
	}
	payload := make([]byte, 128)
	return read, func(ctx context.Context) (raft.Index, error) {
		r, err := c.Servers[leader].Propose(ctx, payload)
		return r.Index, err
	}
}

// checked returns a read: to ask, and to look at the state machine. It fails if
// that does not include entry floor.
func checked(ask func(context.Context) (raft.Index, error), m *cluster.Machine) func(context.Context, raft.Index) error {
	return func(ctx context.Context, floor raft.Index) error {
		index, err := ask(ctx)
		if err != nil {
			return err
		}
		if applied := m.Applied(); index < floor || applied < floor {
			return fmt.Errorf("a read was answered with entry %d and found entry %d applied, although entry %d was acknowledged before it began", index, applied, floor)
		}
		return nil
	}
}

// tally is what one client has done while that counted.
type tally struct {
	done   int
	micros []uint32 // of every 16th read
	err    error
}

func (b *bout) reader(ctx context.Context, t *tally) {
	for i := 0; !b.over.Load(); i++ {
		sampled := i%16 == 0
		var began time.Time
		if sampled {
			began = time.Now()
		}
		if t.err = b.reads(ctx, raft.Index(b.acknowledged.Load())); t.err != nil {
			return
		}
		if !b.counting.Load() {
			continue
		}
		t.done++
		if sampled {
			t.micros = append(t.micros, uint32(time.Since(began).Microseconds()))
		}
	}
}

func (b *bout) writer(ctx context.Context, t *tally) {
	for !b.over.Load() {
		var index raft.Index
		if index, t.err = b.writes(ctx); t.err != nil {
			return
		}
		for old := b.acknowledged.Load(); old < uint64(index) && !b.acknowledged.CompareAndSwap(old, uint64(index)); {
			old = b.acknowledged.Load()
		}
		if b.counting.Load() {
			t.done++
		}
	}
}

// patience bounds how long after the end of a bout a client may take.
const patience = 30 * time.Second

func (b *bout) run(ctx context.Context, o options) (sample, error) {
	ctx, cancel := context.WithCancel(ctx) // clients have contexts that can end, as those of services do
	defer cancel()
	readers, writers := make([]tally, o.clients), []tally(nil)
	if b.writes != nil {
		writers = make([]tally, o.writers)
	}
	var wg sync.WaitGroup
	for i := range readers {
		wg.Go(func() { b.reader(ctx, &readers[i]) })
	}
	for i := range writers {
		wg.Go(func() { b.writer(ctx, &writers[i]) })
	}
	interrupted := pause(ctx, o.warmup)
	before := takeReading()
	b.counting.Store(true)
	if interrupted == nil {
		interrupted = pause(ctx, o.seconds)
	}
	b.counting.Store(false)
	after := takeReading()
	b.over.Store(true)
	stuck := time.AfterFunc(patience, cancel)
	wg.Wait()
	stuck.Stop()

	var micros []uint32
	var errs []error
	reads, writes := 0, 0
	for _, t := range readers {
		reads, micros, errs = reads+t.done, append(micros, t.micros...), append(errs, t.err)
	}
	for _, t := range writers {
		writes, errs = writes+t.done, append(errs, t.err)
	}
	if err := errors.Join(append(errs, interrupted)...); err != nil {
		return sample{}, err
	}
	if len(micros) == 0 {
		return sample{}, errors.New("no read ended within the measured time; use a longer -time")
	}
	slices.Sort(micros)
	seconds := after.at.Sub(before.at).Seconds()
	return sample{
		PerSec: float64(reads) / seconds, WritesPerSec: float64(writes) / seconds,
		P50: float64(micros[len(micros)/2]) / 1000, P99: float64(micros[len(micros)*99/100]) / 1000,
		CPUMicros: float64((after.cpu - before.cpu).Microseconds()) / float64(reads),
		Allocs:    float64(after.mallocs-before.mallocs) / float64(reads),
	}, nil
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// reading is the process's running totals at one moment.
type reading struct {
	at      time.Time
	cpu     time.Duration
	mallocs uint64
}

func takeReading() reading {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u) // it fails only for arguments that are not valid
	return reading{time.Now(), time.Duration(u.Utime.Nano() + u.Stime.Nano()), m.Mallocs}
}

// loop is the reference, reads without Raft: one goroutine sends a byte over TCP
// to another one, which sends it back, and then tells all who waited when it
// began, by closing one channel.
type loop struct {
	mu     sync.Mutex
	next   chan struct{}
	wanted chan struct{}
	done   chan struct{}
	conns  [2]net.Conn
	wg     sync.WaitGroup
}

func newLoop() (*loop, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer l.Close()
	r := &loop{next: make(chan struct{}), wanted: make(chan struct{}, 1), done: make(chan struct{})}
	if r.conns[0], err = net.Dial("tcp", l.Addr().String()); err != nil {
		return nil, err
	}
	if r.conns[1], err = l.Accept(); err != nil {
		return nil, errors.Join(err, r.conns[0].Close())
	}
	r.wg.Go(r.answer)
	r.wg.Go(r.ask)
	return r, nil
}

func (r *loop) answer() {
	var b [1]byte
	for {
		if _, err := r.conns[1].Read(b[:]); err != nil {
			return
		}
		if _, err := r.conns[1].Write(b[:]); err != nil {
			return
		}
	}
}

func (r *loop) ask() {
	defer r.conns[0].Close() // ends answer
	var b [1]byte
	for {
		select {
		case <-r.wanted:
		case <-r.done:
			return
		}
		r.mu.Lock()
		round := r.next
		r.next = make(chan struct{})
		r.mu.Unlock()
		if _, err := r.conns[0].Write(b[:]); err != nil {
			return
		}
		if _, err := r.conns[0].Read(b[:]); err != nil {
			return
		}
		close(round)
	}
}

func (r *loop) read(ctx context.Context, _ raft.Index) error {
	r.mu.Lock()
	round := r.next
	r.mu.Unlock()
	select {
	case r.wanted <- struct{}{}:
	default:
	}
	select {
	case <-round:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (r *loop) stop() error {
	close(r.done)
	r.wg.Wait()
	return r.conns[1].Close()
}
