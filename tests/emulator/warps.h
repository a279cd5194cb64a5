// Operations that the lanes of a warp meet in. Part of emulator.cpp.
#pragma once

#include "blocks.h"

namespace emulator {
namespace {

// In a lane: joins, or begins, the operation that the lanes of `mask` meet in.
Rendezvous& meet(Exchange operation, void (*together)(Lanes), unsigned mask, int width, Place place) {
  const Fiber& me = *current;
  const unsigned lane = me.thread % kWarp, first = me.thread - lane;
  const auto what = [&] { return std::string(name(operation)) + " at " + text(place); };
  if ((mask >> lane & 1) == 0) fail(text(me) + " is not in the mask of its own " + what());
  Warp& warp = me.block->warps[first / kWarp];
  for (unsigned l = 0; l < kWarp; ++l)
    if ((mask >> l & 1) != 0 && (first + l >= threads || me.block->fibers[first + l].state == State::exited))
      fail("lane " + std::to_string(l) + " is in the mask of " + what() + ", but is not there");
  const auto r = std::find_if(warp.open.begin(), warp.open.end(), [&](const Rendezvous& r) { return (r.mask & mask) != 0; });
  if (r == warp.open.end())
    return warp.open.emplace_back(operation, mask, 0, width, together, place, &warp.tokens[warp.used++ % warp.tokens.size()]);
  if (r->mask != mask || r->operation != operation || r->width != width || r->together != together || !same(r->place, place))
    fail(text(me) + " is in " + what() + " with another mask or place than lanes that wait in " + name(r->operation) + " at " +
         text(r->place));
  return *r;
}

// Waits in r for the other lanes. The last one calls finish(lanes) before any goes on.
template <typename Finish>
void wait_for_lanes(Rendezvous& r, Finish finish) {
  Fiber& me = *current;
  const unsigned lane = me.thread % kWarp, first = me.thread - lane;
  me.place = r.place, me.state = State::in_exchange;
  r.arrived |= 1u << lane;
  if (r.arrived == r.mask) {
    static std::vector<Fiber*> lanes;
    for (unsigned l = 0; l < kWarp; ++l)
      if ((r.mask >> l & 1) != 0) lanes.push_back(&me.block->fibers[first + l]);
    finish(lanes);
    std::vector<Rendezvous>& open = me.block->warps[first / kWarp].open;
    r = open.back(), open.pop_back();
    enqueue_all(lanes);
  }
  run_next();
}

}  // namespace

uint64_t warp_exchange(Exchange operation, unsigned mask, uint64_t value, int argument, int width, Place place) {
  Fiber& me = *current;
  const auto what = [&] { return std::string(name(operation)) + " at " + text(place); };
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) fail("the width of " + what() + " is no power of two up to 32");
  Rendezvous& r = meet(operation, nullptr, mask, width, place);
  const int l = static_cast<int>(me.thread % kWarp), segment = l / width * width;
  switch (operation) {
    case Exchange::shuffle: me.source = segment + (argument & (width - 1)); break;
    case Exchange::shuffle_up: me.source = l - argument < segment ? l : l - argument; break;
    case Exchange::shuffle_down: me.source = l + argument >= segment + width ? l : l + argument; break;
    case Exchange::shuffle_xor: me.source = (l ^ argument) >= segment + width ? l : l ^ argument; break;
    default: me.source = l;
  }
  if ((mask >> me.source & 1) == 0)
    fail(text(me) + " reads lane " + std::to_string(me.source) + ", which is not in the mask of " + what());
  me.value = value;
  Token* const token = operation == Exchange::sync ? r.token : nullptr;  // the others order no memory
  if (token != nullptr) token->release();
  wait_for_lanes(r, [&](const std::vector<Fiber*>& lanes) {
    std::array<uint64_t, kWarp> given{};
    unsigned ballot = 0;
    for (const Fiber* const f : lanes) {
      given[f->thread % kWarp] = f->value;
      ballot |= static_cast<unsigned>(f->value != 0) << f->thread % kWarp;
    }
    for (Fiber* const f : lanes) f->value = operation == Exchange::ballot ? ballot : given[f->source];
  });
  if (token != nullptr) token->acquire();
  return me.value;
}

void warp_together(Exchange operation, void (*together)(Lanes), void* mine, Place place) {
  Rendezvous& r = meet(operation, together, ~0u, kWarp, place);
  current->brought = mine;
  wait_for_lanes(r, [&](const std::vector<Fiber*>& lanes) {
    std::array<void*, kWarp> brought;
    for (const Fiber* const f : lanes) brought[f->thread % kWarp] = f->brought;
    together(brought.data());
  });
}

int lane() { return static_cast<int>(current->thread % kWarp); }

}  // namespace emulator
