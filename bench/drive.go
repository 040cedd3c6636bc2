package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// load is what one system is put under for one round.
type load struct {
	Clients int           // closed-loop: each has one proposal outstanding
	Size    int           // bytes per payload
	Warmup  time.Duration // driven but not counted
	Measure time.Duration
}

// sample is one system's figures of one round.
type sample struct {
	System  string  `json:"system"`
	Clients int     `json:"clients"`
	Round   int     `json:"round"`
	Ops     int     `json:"ops"`     // acknowledged while measuring
	Seconds float64 `json:"seconds"` // measured wall time

	OpsPerSec   float64 `json:"ops_per_sec"`
	P50, P99    float64 `json:"-"` // ms; also in Quantiles
	CPUPer100k  float64 `json:"cpu_seconds_per_100k_ops"`
	AllocsPerOp float64 `json:"allocs_per_op"`
	Goroutines  int     `json:"goroutines"`      // the system's own, under load
	Left        int     `json:"goroutines_left"` // still there after Stop
	RSSMiB      float64 `json:"rss_mib"`         // of the whole process, under load

	Quantiles []quantile `json:"latency"`
}

// quantile says that the share Q of all proposals took at most Ms milliseconds.
type quantile struct {
	Q  float64 `json:"q"`
	Ms float64 `json:"ms"`
}

func quantilePoints() []float64 {
	return []float64{0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 0.9999, 1}
}

// The phases of a round, in order.
const (
	warming int32 = iota
	measuring
	stopping
)

// hangTimeout is how long after the end of a round a proposal may take before
// the system counts as hung.
const hangTimeout = 30 * time.Second

// client proposes, waits, and proposes again. Latencies are kept as they are
// and sorted after the round: exact, and nothing shared is written while
// measuring.
type client struct {
	payload []byte
	micros  []uint32 // of proposals acknowledged while measuring
	ops     uint64   // acknowledged since the start, warm-up included
	err     error
}

func (c *client) run(sys System, phase *atomic.Int32) {
	ctx := context.Background() // No cancellation: waiting on one costs extra, and Stop ends a hung wait.
	begin := time.Now()
	for phase.Load() != stopping {
		c.stamp()
		if c.err = sys.Propose(ctx, c.payload); c.err != nil {
			return
		}
		c.ops++
		end := time.Now()
		if phase.Load() == measuring {
			c.micros = append(c.micros, uint32(min(end.Sub(begin).Microseconds(), math.MaxUint32)))
		}
		begin = end
	}
}

// stamp makes the payload differ from the one before, as far as it has room.
func (c *client) stamp() {
	if len(c.payload) >= 16 {
		binary.LittleEndian.PutUint64(c.payload[8:], c.ops)
	}
}

func newClients(l load) []*client {
	clients := make([]*client, l.Clients)
	for i := range clients {
		dice := rand.NewChaCha8([32]byte{byte(i), byte(i >> 8), byte(i >> 16)})
		clients[i] = &client{payload: make([]byte, l.Size)}
		dice.Read(clients[i].payload) // It never fails.
	}
	return clients
}

// runRound starts sys in dir, drives it through warm-up and measurement, and
// stops it. An error means that there are no figures: the round does not count.
func runRound(ctx context.Context, sys System, dir string, l load) (s sample, err error) {
	runtime.GC() // What an earlier round left behind is not this one's work.
	before := runtime.NumGoroutine()
	if err := sys.Start(dir); err != nil {
		return sample{}, fmt.Errorf("start: %w", err)
	}
	s, err = measure(ctx, sys, l, before)
	if stopErr := sys.Stop(); stopErr != nil {
		err = errors.Join(err, fmt.Errorf("stop: %w", stopErr))
	}
	s.Left = settle(before)
	return s, err
}

func measure(ctx context.Context, sys System, l load, before int) (sample, error) {
	clients := newClients(l)
	var phase atomic.Int32
	var wg sync.WaitGroup
	for _, c := range clients {
		wg.Go(func() { c.run(sys, &phase) })
	}
	done := make(chan struct{}) // closed when every client has returned
	go func() { wg.Wait(); close(done) }()
	const own = 1 // that goroutine

	interrupted := wait(ctx, l.Warmup)
	start := takeReading()
	phase.Store(measuring)
	if interrupted == nil {
		interrupted = wait(ctx, l.Measure)
	}
	goroutines := runtime.NumGoroutine() - before - l.Clients - own
	phase.Store(stopping)
	end := takeReading()
	rss := residentMiB()

	select {
	case <-done:
	case <-time.After(hangTimeout):
		return sample{}, fmt.Errorf("a proposal has been waiting for %v; the system hangs", hangTimeout)
	}
	var total uint64
	var micros []uint32
	for _, c := range clients {
		if c.err != nil {
			return sample{}, fmt.Errorf("propose: %w", c.err)
		}
		total += c.ops
		micros = append(micros, c.micros...)
	}
	if interrupted != nil {
		return sample{}, interrupted
	}
	if err := sys.Check(int64(total), l.Size); err != nil {
		return sample{}, err
	}
	if len(micros) == 0 {
		return sample{}, fmt.Errorf("no proposal was acknowledged within %v; use longer -seconds", l.Measure)
	}
	s := start.until(end, micros)
	s.Goroutines, s.RSSMiB = goroutines, rss
	return s, nil
}

func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// settle gives goroutines that have been told to end a moment to do so, and
// returns how many more there are than before.
func settle(before int) int {
	for range 100 {
		if runtime.NumGoroutine() <= before {
			return 0
		}
		time.Sleep(time.Millisecond)
	}
	return runtime.NumGoroutine() - before
}

// reading is the process's running totals at one moment.
type reading struct {
	at      time.Time
	cpu     time.Duration // user and system
	mallocs uint64
}

func takeReading() reading {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	var u syscall.Rusage
	// It fails only for arguments that are not valid, and these are.
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	cpu := time.Duration(u.Utime.Nano() + u.Stime.Nano())
	return reading{at: time.Now(), cpu: cpu, mallocs: m.Mallocs}
}

// until turns two readings and the latencies between them into figures. It
// sorts micros, which must not be empty.
func (r reading) until(end reading, micros []uint32) sample {
	slices.Sort(micros)
	ops := float64(len(micros))
	seconds := end.at.Sub(r.at).Seconds()
	s := sample{
		Ops:         len(micros),
		Seconds:     seconds,
		OpsPerSec:   ops / seconds,
		CPUPer100k:  (end.cpu - r.cpu).Seconds() / ops * 100_000,
		AllocsPerOp: float64(end.mallocs-r.mallocs) / ops,
		P50:         quantileMs(micros, 0.5),
		P99:         quantileMs(micros, 0.99),
	}
	for _, q := range quantilePoints() {
		s.Quantiles = append(s.Quantiles, quantile{q, quantileMs(micros, q)})
	}
	return s
}

// quantileMs returns the smallest latency that at least the share q of the
// sorted latencies does not exceed.
func quantileMs(sorted []uint32, q float64) float64 {
	i := int(math.Ceil(q*float64(len(sorted)))) - 1
	return float64(sorted[max(i, 0)]) / 1000
}

// residentMiB is the process's resident memory, or 0 where it cannot be read.
func residentMiB() float64 {
	statm, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(statm))
	if len(fields) < 2 {
		return 0
	}
	pages, err := strconv.ParseFloat(fields[1], 64)
	if err != nil {
		return 0
	}
	return pages * float64(os.Getpagesize()) / (1 << 20)
}
