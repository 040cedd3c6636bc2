package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func near(a, b float64) bool { return math.Abs(a-b) < 1e-9 }

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		in   []float64
		want float64
	}{{nil, 0}, {[]float64{3}, 3}, {[]float64{9, 1, 5}, 5}, {[]float64{4, 1, 2, 9}, 3}} {
		if got := median(c.in); !near(got, c.want) {
			t.Errorf("median(%v) = %v, want %v", c.in, got, c.want)
		}
	}
}

func TestRatioIsTakenRoundByRound(t *testing.T) {
	rates := func(perSec ...float64) []sample {
		var s []sample
		for round, r := range perSec {
			s = append(s, sample{Round: round, OpsPerSec: r})
		}
		return s
	}
	// The machine was twice as fast in the last round. Medians of each system
	// alone would say 50/200; each round says 0.4, 0.5 and 0.125.
	pump := rates(100, 200, 400)
	own := rates(40, 100, 50)
	slices.Reverse(own) // The order of running does not matter, the round does.
	r := ratioToPump(own, pump)
	if r == nil || !near(r.Median, 0.4) || !near(r.Min, 0.125) || !near(r.Max, 0.5) {
		t.Errorf("ratio = %+v, want median 0.4 of [0.125, 0.5]", r)
	}
	if r := ratioToPump(own, nil); r != nil {
		t.Errorf("ratio without a pump = %+v, want none", r)
	}
	if r := ratioToPump(own[:1], pump[:2]); r != nil {
		t.Errorf("ratio of rounds that do not match = %+v, want none", r)
	}
}

func TestSummarize(t *testing.T) {
	samples := []sample{
		{System: "pump", Clients: 16, Round: 0, OpsPerSec: 10, P50: 1, Goroutines: 5, RSSMiB: 7},
		{System: "raft", Clients: 16, Round: 0, OpsPerSec: 5, P50: 3, Goroutines: 30},
		{System: "raft", Clients: 16, Round: 1, OpsPerSec: 8, P50: 1, Goroutines: 31, Left: 2},
		{System: "pump", Clients: 16, Round: 1, OpsPerSec: 10, P50: 1, Goroutines: 5, RSSMiB: 6},
		{System: "raft", Clients: 1, Round: 0, OpsPerSec: 3},
	}
	rows := summarize(samples, []string{"pump", "raft"}, []int{1, 16})
	if len(rows) != 3 {
		t.Fatalf("%d rows, want 3: %+v", len(rows), rows)
	}
	if r := rows[0]; r.System != "raft" || r.Clients != 1 || r.Ratio != nil {
		t.Errorf("first row = %+v, want raft at 1 client without a ratio", r)
	}
	if r := rows[1]; r.System != "pump" || !near(r.Ratio.Median, 1) || r.RSSMiB != 7 {
		t.Errorf("second row = %+v, want the pump at ratio 1 and RSS 7", r)
	}
	r := rows[2]
	if r.System != "raft" || r.Rounds != 2 || !near(r.OpsPerSec, 6.5) || !near(r.Ratio.Median, 0.65) ||
		!near(r.P50, 2) || r.Goroutines != 31 || r.Left != 2 {
		t.Errorf("third row = %+v", r)
	}
}

func TestQuantile(t *testing.T) {
	var micros []uint32
	for i := range 1000 {
		micros = append(micros, uint32(i+1))
	}
	for _, c := range []struct{ q, want float64 }{{0, 0.001}, {0.5, 0.5}, {0.99, 0.99}, {0.999, 0.999}, {1, 1}} {
		if got := quantileMs(micros, c.q); !near(got, c.want) {
			t.Errorf("quantile %v = %v ms, want %v", c.q, got, c.want)
		}
	}
	if got := quantileMs([]uint32{1000, 9000}, 0.99); !near(got, 9) {
		t.Errorf("p99 of two = %v ms, want the larger", got)
	}
}

func TestReadingsBecomeFigures(t *testing.T) {
	start := reading{at: time.Unix(100, 0), cpu: time.Second, mallocs: 50}
	end := reading{at: time.Unix(102, 0), cpu: 3 * time.Second, mallocs: 62}
	s := start.until(end, []uint32{4000, 1000, 2000, 3000})
	if s.Ops != 4 || !near(s.OpsPerSec, 2) || !near(s.CPUPer100k, 50_000) || !near(s.AllocsPerOp, 3) ||
		!near(s.P50, 2) || !near(s.P99, 4) || !near(s.Seconds, 2) {
		t.Errorf("figures = %+v", s)
	}
}

func TestOrderAlternates(t *testing.T) {
	systems := []string{"a", "b", "c"}
	if got := order(systems, 0); !slices.Equal(got, []string{"a", "b", "c"}) {
		t.Errorf("round 0 runs %v", got)
	}
	if got := order(systems, 1); !slices.Equal(got, []string{"c", "b", "a"}) {
		t.Errorf("round 1 runs %v", got)
	}
	if systems[0] != "a" {
		t.Error("order changed the list it was given")
	}
}

func TestFlagErrorsNameEveryBadFlag(t *testing.T) {
	_, err := parseFlags([]string{
		"-systems", "pump,pump,ancestor", "-clients", "1,none,0,1", "-size", "0", "-rounds", "0",
		"-seconds", "0", "-warmup", "-1", "-procs", "0", "extra",
	}, io.Discard)
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{
		`"pump" is named twice`, `unknown system "ancestor"; choose from [pump raft hashicorp etcd etcd-packed]`,
		`"none" is not a number of clients`, `"0" is not a number of clients`, "1 is named twice",
		"-size: 0", "-rounds: 0", "-seconds: 0", "-warmup: -1", "-procs: 0", `unexpected argument "extra"`,
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not say %q:\n%v", want, err)
		}
	}
}

func TestFlagDefaults(t *testing.T) {
	o, err := parseFlags([]string{"-systems", "pump"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(o.clients, []int{1, 16, 256, 1024}) || o.size != 128 || o.rounds != 9 ||
		o.measure != 2*time.Second || o.procs != 8 || o.allowTmpfs {
		t.Errorf("defaults = %+v", o)
	}
}

func TestMemoryFileSystemsAreRefused(t *testing.T) {
	for _, fs := range []string{"tmpfs", "ramfs"} {
		if err := refuseMemory(fs, "/somewhere", false); err == nil || !strings.Contains(err.Error(), "-allow-tmpfs") {
			t.Errorf("%s: error %v, want one that names the way out", fs, err)
		}
		if err := refuseMemory(fs, "/somewhere", true); err != nil {
			t.Errorf("%s, allowed: %v", fs, err)
		}
	}
	if err := refuseMemory("ext4", "/somewhere", false); err != nil {
		t.Error(err)
	}
}

func TestRunRefusesTmpfs(t *testing.T) {
	const shm = "/dev/shm"
	if fs, err := fileSystem(shm); err != nil || fs != "tmpfs" {
		t.Skipf("%s is not a tmpfs here (%s, %v)", shm, fs, err)
	}
	err := run(context.Background(), []string{"-systems", "pump", "-dir", shm}, io.Discard, io.Discard)
	if err == nil || !strings.Contains(err.Error(), "tmpfs") || !strings.Contains(err.Error(), "-dir") {
		t.Errorf("error = %v, want a refusal that says what to do", err)
	}
}

// The chart reads what this package writes; its fixture has that form.
func TestChartFixtureIsWhatJSONWrites(t *testing.T) {
	want, err := os.ReadFile("chart/testdata/results.json")
	if err != nil {
		t.Fatal(err)
	}
	var res result
	if err := json.Unmarshal(want, &res); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "results.json")
	if err := writeJSON(name, res); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("what -json writes has other fields than the chart's fixture; bring chart and fixture up to it")
	}
}

// fakeSystem acknowledges at once, until it is told to fail.
type fakeSystem struct {
	failAfter int64 // proposals; 0: never
	checkErr  error
	stopErr   error
	onPropose func(n int64, payload []byte) // called in the n-th proposal, the first is 1
	leak      chan struct{}                 // not nil: Start leaves a goroutine behind until it closes

	proposed, checked atomic.Int64
	stops             atomic.Int64
}

var errFake = errors.New("the fake fails")

func (f *fakeSystem) Start(string) error {
	if f.leak != nil {
		go func() { <-f.leak }()
	}
	return nil
}

func (f *fakeSystem) Propose(_ context.Context, payload []byte) error {
	n := f.proposed.Add(1)
	if f.failAfter > 0 && n > f.failAfter {
		return errFake
	}
	if f.onPropose != nil {
		f.onPropose(n, payload)
	}
	runtime.Gosched()
	return nil
}

func (f *fakeSystem) Check(ops int64, size int) error {
	f.checked.Store(ops * int64(size))
	return f.checkErr
}

func (f *fakeSystem) Stop() error {
	f.stops.Add(1)
	return f.stopErr
}

func shortLoad() load {
	return load{Clients: 3, Size: 10, Warmup: time.Millisecond, Measure: 20 * time.Millisecond}
}

func TestClientCountsOnlyWhileMeasuring(t *testing.T) {
	var phase atomic.Int32
	different := make(map[string]bool)
	f := &fakeSystem{onPropose: func(n int64, payload []byte) {
		different[string(payload)] = true
		switch n {
		case 4:
			phase.Store(measuring)
		case 9:
			phase.Store(stopping)
		}
	}}
	c := &client{payload: make([]byte, 16)}
	c.run(f, &phase)
	if c.err != nil || c.ops != 9 || len(c.micros) != 5 {
		t.Errorf("%d proposals of which %d counted (%v), want 9 and 5", c.ops, len(c.micros), c.err)
	}
	if len(different) != 9 {
		t.Errorf("%d different payloads in 9 proposals", len(different))
	}
}

func TestRoundIsCheckedAndStopped(t *testing.T) {
	f := &fakeSystem{}
	s, err := runRound(context.Background(), f, t.TempDir(), shortLoad())
	if err != nil {
		t.Fatal(err)
	}
	if s.Ops < 1 || int64(s.Ops) > f.proposed.Load() || s.Left != 0 || s.Goroutines != 0 {
		t.Errorf("sample = %+v after %d proposals", s, f.proposed.Load())
	}
	if got, want := f.checked.Load(), f.proposed.Load()*10; got != want {
		t.Errorf("Check was told %d bytes, want those of every proposal, %d", got, want)
	}
	if f.stops.Load() != 1 {
		t.Errorf("Stop was called %d times", f.stops.Load())
	}
}

func TestRoundThatFailsHasNoFigures(t *testing.T) {
	for name, f := range map[string]*fakeSystem{
		"propose": {failAfter: 5},
		"check":   {checkErr: errFake},
		"stop":    {stopErr: errFake},
	} {
		if _, err := runRound(context.Background(), f, t.TempDir(), shortLoad()); !errors.Is(err, errFake) {
			t.Errorf("%s: error %v, want %v", name, err, errFake)
		}
		if f.stops.Load() != 1 {
			t.Errorf("%s: Stop was called %d times, want once", name, f.stops.Load())
		}
	}
}

func TestRoundEndsWhenInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	l := shortLoad()
	l.Warmup, l.Measure = time.Hour, time.Hour
	f := &fakeSystem{}
	if _, err := runRound(ctx, f, t.TempDir(), l); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want %v", err, context.Canceled)
	}
	if f.stops.Load() != 1 {
		t.Errorf("Stop was called %d times", f.stops.Load())
	}
}

func TestLeftGoroutinesAreCounted(t *testing.T) {
	leak := make(chan struct{})
	defer close(leak)
	s, err := runRound(context.Background(), &fakeSystem{leak: leak}, t.TempDir(), shortLoad())
	if err != nil {
		t.Fatal(err)
	}
	if s.Left != 1 || s.Goroutines != 1 {
		t.Errorf("goroutines = %d, left = %d; want 1 and 1", s.Goroutines, s.Left)
	}
}

func TestRunPrintsTheTablesAndCleansUp(t *testing.T) {
	dir, out := t.TempDir(), filepath.Join(t.TempDir(), "out.json")
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(0))
	var text bytes.Buffer
	err := run(context.Background(), []string{
		"-systems", "pump", "-clients", "1,4", "-rounds", "2", "-seconds", "0.25", "-warmup", "0.01",
		"-procs", "3", "-dir", dir, "-allow-tmpfs", "-json", out,
	}, &text, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"GOMAXPROCS 3", "1 clients, 2 rounds", "4 clients, 2 rounds", "1.000 [1.000, 1.000]", intervalMeaning} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("the text does not say %q:\n%s", want, text.String())
		}
	}
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	var res result
	if err := json.Unmarshal(b, &res); err != nil {
		t.Fatal(err)
	}
	if len(res.Rows) != 2 || len(res.Samples) != 4 || res.Machine.GOMAXPROCS != 3 {
		t.Fatalf("JSON has %d rows and %d samples on %+v", len(res.Rows), len(res.Samples), res.Machine)
	}
	for _, s := range res.Samples {
		if s.Ops < 1 || s.OpsPerSec <= 0 || s.Left != 0 || len(s.Quantiles) != len(quantilePoints()) {
			t.Errorf("sample = %+v", s)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("after the run the directory holds %v (%v), want nothing", left, err)
	}
}
